"""Everything but matrix products and attention in the exact profile, with gradients: float32 on the CPU.

The native headers norm_kernels.h, rope_kernels.h, activation_kernels.h and softmax_kernels.h say which bits come out.

Shapes: B batch, T tokens, N heads, H head_dim, D features, M rows, V vocab_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from openbook.core.errors import UserError
from openbook.ops import _native

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

# No more logits than those of so many rows exist at a time; the bits do not depend on it.
_CHUNK_ROWS = 256


def exact_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] / sqrt(mean(x^2) + eps) * weight [D] (arXiv 1910.07467). x may be a slice with contiguous features."""
    _check(x=x, weight=weight)
    _check_shape("weight", weight, x.shape[-1:])
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def exact_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation of x [..., D] with weight [D] and bias [D] or None (arXiv 1607.06450)."""
    _check(x=x, weight=weight)
    _check_shape("weight", weight, x.shape[-1:])
    if bias is not None:
        _check(bias=bias)
        _check_shape("bias", bias, x.shape[-1:])
    out: Tensor = _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return out


def exact_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, N, H], which may be a slice, by cos, sin [B, T, H/2], halves paired (arXiv 2104.09864)."""
    _check(x=x, cos=cos, sin=sin)
    for name, table in (("cos", cos), ("sin", sin)):
        _check_shape(name, table, (*x.shape[:2], x.shape[-1] // 2))
    out: Tensor = _Rope.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out


def exact_rope_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of positions int64 [...] times frequencies float32 [J], the product rounded to float32: [..., J]."""
    _check(frequencies=frequencies)
    cos, sin = (torch.empty(*positions.shape, len(frequencies)) for _ in range(2))
    rows = (_array(table.view(-1, len(frequencies))) for table in (cos, sin))
    _native.rope_tables(_flat(positions.float()), _flat(frequencies), *rows)
    return cos, sin


def exact_sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return _pointwise(x, _native.sigmoid_forward, _native.sigmoid_backward)


def exact_gelu_tanh(x: Tensor) -> Tensor:
    """See `Ops.gelu_tanh`."""
    return _pointwise(x, _native.gelu_tanh_forward, _native.gelu_tanh_backward)


def exact_gelu(x: Tensor) -> Tensor:
    """See `Ops.gelu`."""
    return _pointwise(x, _native.gelu_forward, _native.gelu_backward)


def exact_gelu_sigmoid(x: Tensor) -> Tensor:
    """See `Ops.gelu_sigmoid`."""
    return _pointwise(x, _native.gelu_sigmoid_forward, _native.gelu_sigmoid_backward)


def exact_silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202); gate_up [..., 2 D], gate first: [..., D]."""
    _check_pairs(gate_up)
    out: Tensor = _SiLUMul.apply(gate_up)  # type: ignore[no-untyped-call]
    return out


def exact_clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """See `Ops.clamped_swiglu`; gate_up [..., 2 D], gate and up in turn: [..., D]."""
    _check_pairs(gate_up)
    out: Tensor = _ClampedSwiGLU.apply(gate_up, alpha, limit)  # type: ignore[no-untyped-call]
    return out


def exact_softmax(x: Tensor) -> Tensor:
    """Softmax over the last axis."""
    _check(x=x)
    out: Tensor = _Softmax.apply(x)  # type: ignore[no-untyped-call]
    return out


def exact_softmax_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of -log softmax(logits)[target]; logits [M, V], targets int64 [M], negative ones ignored.

    The gradient is made in the forward pass, which reads the logits once; it can be taken once. Losses of rows are
    added up in 16 lanes, as `_native.sum` does.

    Raises:
        UserError: a target is past the last logit.
    """
    _check(logits=logits)
    _check_targets(targets, *logits.shape)
    loss: Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return loss


def exact_linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`exact_softmax_cross_entropy` of x [M, D] times weight [V, D] transposed, without ever holding all logits.

    Value: the same bits as with all logits. Gradients: those of the sum, made in the forward pass, then multiplied by
    what comes from above; they can be taken once.

    Raises:
        UserError: a target is past the last row of the weight.
    """
    _check(x=x, weight=weight)
    _check_shape("weight", weight, (len(weight), x.shape[-1]))
    _check_targets(targets, len(x), len(weight))
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, targets)  # type: ignore[no-untyped-call]
    return loss


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = _rows(x)
        out, scales = torch.empty(x.shape), torch.empty(rows.shape[:2])
        _native.rms_norm_forward(_array(rows), _flat(weight), _matrix(out), _flat(scales), eps)
        ctx.save_for_backward(rows, weight, scales)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, scales = ctx.saved_tensors
        dx, dweight = torch.empty(grads[0].shape), torch.empty(weight.shape)
        _native.rms_norm_backward(
            _matrix(grads[0]), _array(rows), _flat(weight), _flat(scales), _matrix(dx), _array(dweight)
        )
        return dx, dweight, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        x = x.contiguous()
        out, moments = torch.empty(x.shape), torch.empty(2, x.shape[:-1].numel())
        given = torch.empty(0) if bias is None else bias
        _native.layer_norm_forward(_matrix(x), _flat(weight), _flat(given), _matrix(out), *_array(moments), eps)
        ctx.save_for_backward(x, weight, moments)
        ctx.has_bias = bias is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, moments = ctx.saved_tensors
        dx, dweight = torch.empty(x.shape), torch.empty(weight.shape)
        dbias = torch.empty(weight.shape if ctx.has_bias else 0)
        _native.layer_norm_backward(
            _matrix(grads[0]), _matrix(x), _flat(weight), *_array(moments), _matrix(dx), _array(dweight), _array(dbias)
        )
        return dx, dweight, dbias if ctx.has_bias else None, None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = (table.reshape(-1, table.shape[-1]).contiguous() for table in (cos, sin))
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, is_back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _turned(grads[0], *ctx.saved_tensors, is_back=True), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, is_back: bool) -> Tensor:
    out = torch.empty(x.shape)
    x = (x if x.stride(-1) == 1 else x.contiguous()).flatten(0, 1)
    _native.rope(_array(x), _array(cos), _array(sin), _array(out.view(-1, *x.shape[-2:])), is_back)
    return out


def _pointwise(x: Tensor, forward: Callable[..., None], backward: Callable[..., None]) -> Tensor:
    _check(x=x)
    out: Tensor = _Pointwise.apply(x, forward, backward)  # type: ignore[no-untyped-call]
    return out


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[..., None], backward: Callable[..., None]) -> Tensor:
        x, out = x.contiguous(), torch.empty(x.shape)
        forward(_flat(x), _flat(out))
        ctx.save_for_backward(x)
        ctx.backward_kernel = backward
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        dx = torch.empty(x.shape)
        ctx.backward_kernel(_flat(grads[0]), _flat(x), _flat(dx))
        return dx, None, None


class _SiLUMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        out = torch.empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        _native.silu_mul_forward(_matrix(gate_up), _matrix(out))
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        dgate_up = torch.empty(gate_up.shape)
        _native.silu_mul_backward(_matrix(grads[0]), _matrix(gate_up), _matrix(dgate_up))
        return dgate_up


class _ClampedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        gate_up = gate_up.contiguous()
        out = torch.empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        _native.clamped_swiglu_forward(_flat(gate_up), _flat(out), alpha, limit)
        ctx.save_for_backward(gate_up)
        ctx.constants = alpha, limit
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gate_up,) = ctx.saved_tensors
        dgate_up = torch.empty(gate_up.shape)
        _native.clamped_swiglu_backward(_flat(grads[0]), _flat(gate_up), _flat(dgate_up), *ctx.constants)
        return dgate_up, None, None


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty(x.shape)
        _native.softmax_forward(_matrix(x), _matrix(out))
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        dx = torch.empty(out.shape)
        _native.softmax_backward(_matrix(grads[0]), _matrix(out), _matrix(dx))
        return dx


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses = torch.empty(len(logits))
        ctx.dlogits = torch.empty(logits.shape if ctx.needs_input_grad[0] else (0, 0))
        _native.cross_entropy(_matrix(logits), targets.contiguous().numpy(), _array(losses), _array(ctx.dlogits))
        return torch.tensor(_native.sum(_array(losses)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _made_gradient(ctx, "dlogits", grads[0]), None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        x, targets = x.contiguous(), targets.contiguous()
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.dx = torch.empty(x.shape) if needs_x else None
        ctx.dweight = torch.zeros(weight.shape) if needs_weight else None
        losses, logits = torch.empty(len(x)), torch.empty(min(len(x), _CHUNK_ROWS), len(weight))
        weight_VD = _array(weight)[None]
        for begin in range(0, len(x), _CHUNK_ROWS):
            rows = slice(begin, begin + _CHUNK_ROWS)
            x_rows, out = _array(x[rows]), _array(logits[: len(x[rows])])
            _native.gemm(x_rows[None], weight_VD.transpose(0, 2, 1), out[None])
            into = out if needs_x or needs_weight else out[:0, :0]
            _native.cross_entropy(out, targets[rows].numpy(), _array(losses[rows]), into)
            if needs_x:
                _native.gemm(out[None], weight_VD, _array(ctx.dx[rows])[None])
            if needs_weight:
                _native.gemm(out.T[None], x_rows[None], _array(ctx.dweight)[None], accumulate=True)
        return torch.tensor(_native.sum(_array(losses)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dx, dweight = (
            None if getattr(ctx, name) is None else _made_gradient(ctx, name, grads[0]) for name in ("dx", "dweight")
        )
        return dx, dweight, None


def _made_gradient(ctx: Any, name: str, factor: Tensor) -> Tensor:
    """The gradient that the forward pass left, times `factor`, in its own memory."""
    grad: Tensor | str = getattr(ctx, name)
    if isinstance(grad, str):
        raise RuntimeError("the gradient of the exact cross entropy was taken already: compute the loss again")
    setattr(ctx, name, "taken")
    if factor.item() != 1.0:
        _native.scale(_flat(grad), factor.item())
    return grad


def _array(x: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    # Through numpy: nanobind reads its arrays in a tenth of the time that a tensor takes.
    array: np.ndarray[Any, np.dtype[np.float32]] = x.detach().numpy()
    return array


def _flat(x: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return _array(x.contiguous().view(-1))


def _matrix(x: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return _array(x.contiguous().view(-1, x.shape[-1]))


def _rows(x: Tensor) -> Tensor:
    """x [..., D] as [R, N, D] with contiguous features; a copy only where strides leave no other way."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.dim() < 3 or x.is_contiguous():
        return x.reshape(-1, 1, x.shape[-1])
    return x.flatten(0, -3)


def _check(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise UserError(
                f"{name} is {tensor.dtype} on {tensor.device}, but the exact profile computes in torch.float32 on cpu: "
                "convert it, or use profile fast"
            )


def _check_shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        raise UserError(f"{name} has shape {list(x.shape)}, expected {list(expected)}: check the shapes")


def _check_pairs(gate_up: Tensor) -> None:
    _check(gate_up=gate_up)
    if gate_up.shape[-1] % 2:
        raise UserError(f"gate_up has shape {list(gate_up.shape)}, expected an even last axis: check the shapes")


def _check_targets(targets: Tensor, rows: int, num_classes: int) -> None:
    _check_shape("targets", targets, (rows,))
    if rows and int(targets.max()) >= num_classes:
        raise UserError(f"a target is {int(targets.max())}, expected less than {num_classes}: check the tokenizer")
