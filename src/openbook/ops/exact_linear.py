"""Products of matrices in the exact profile: every output is a chain of fused multiply-adds over k ascending, from +0.

Shapes: M rows, K features in, N features out, B matrices of a batch, V vocab_size, D features of an embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from openbook.core.errors import UserError
from openbook.ops import _native

if TYPE_CHECKING:
    import numpy as np


def exact_matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The product of a [M, K] and b [K, N], or of B of each, [B, M, K] and [B, K, N]; float32. Has no gradient.

    Any strides do: a transposed view is read as it lies.

    Args:
        out: where the product goes, [M, N] or [B, M, N], float32; a new tensor if None.

    Returns:
        [M, N] or [B, M, N].

    Raises:
        UserError: another dtype or device, or shapes that do not fit.
    """
    _check("a", a)
    _check("b", b)
    a_shape, b_shape = a.shape, b.shape
    rank = len(a_shape)
    if rank != len(b_shape) or rank not in (2, 3) or a_shape[-1] != b_shape[-2] or a_shape[:-2] != b_shape[:-2]:
        raise UserError(
            f"cannot multiply shapes {list(a_shape)} and {list(b_shape)}: expected [M, K] and [K, N], or [B, M, K] and "
            "[B, K, N]; check the shapes"
        )
    shape = (*a_shape[:-1], b_shape[-1])
    if out is None:
        out = torch.empty(shape)
    else:
        _check("out", out)
        if out.shape != shape:
            raise UserError(f"out has shape {list(out.shape)}, expected {list(shape)}; correct it")
    if out.stride(-1) != 1 and shape[-1] > 1:
        return out.copy_(exact_matmul(a, b))
    _native.gemm(_array(a), _array(b), _array(out))
    return out


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times weight [N, K] transposed, plus bias [N]: [..., N]; float32, with gradients.

    Raises:
        UserError: another dtype or device, or shapes that do not fit.
    """
    _check("x", x)
    _check("weight", weight)
    if bias is not None:
        _check("bias", bias)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise UserError(
            f"x has shape {list(x.shape)} and weight {list(weight.shape)}: expected [..., K] and [N, K]; correct them"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(f"bias has shape {list(bias.shape)}, expected {list(weight.shape[:1])}; check the shapes")
    out: Tensor = ExactLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


class ExactLinear(torch.autograd.Function):
    """`exact_linear`; the gradient of the bias adds rows in their order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Arguments as for `exact_linear`, and known to fit."""
        ctx.save_for_backward(x, weight)
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty(len(rows), len(weight))
        _native.gemm(_array(rows), _array(weight).T, _array(out), None if bias is None else _array(bias.contiguous()))
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """From the gradient of the result, [..., N], those of x, weight and bias."""
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, len(weight))
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = exact_matmul(grad, weight).view(x.shape) if needs_x else None
        grad_weight = exact_matmul(grad.T, x.reshape(-1, x.shape[-1])) if needs_weight else None
        grad_bias = _sum_rows(grad) if needs_bias else None
        return grad_x, grad_weight, grad_bias


def exact_embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [V, D], float32, at ids int64 [...]: [..., D].

    The gradient of a row is the sum over its tokens in their order, from +0.

    Raises:
        UserError: another dtype or device, or an id that the weight has no row for.
    """
    _check("weight", weight)
    if ids.dtype != torch.int64 or ids.device.type != "cpu":
        raise UserError(f"ids are {ids.dtype} on {ids.device}, expected torch.int64 on cpu; convert them")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(weight):
        raise UserError(
            f"ids are from {int(ids.min())} to {int(ids.max())}, expected 0 to {len(weight) - 1}; check the tokenizer"
        )
    out: Tensor = ExactEmbedding.apply(ids, weight)  # type: ignore[no-untyped-call]
    return out


class ExactEmbedding(torch.autograd.Function):
    """`exact_embedding`."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        """Arguments as for `exact_embedding`, and known to fit."""
        ctx.save_for_backward(ids)
        ctx.num_rows = len(weight)
        flat = ids.reshape(-1)
        out = torch.empty(len(flat), weight.shape[1])
        _native.take_rows(_array(weight.contiguous()), flat.contiguous().numpy(), _array(out))
        return out.view(*ids.shape, weight.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        """From the gradient of the result, [..., D], that of the weight."""
        (ids,) = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1]).contiguous()
        grad_weight = torch.zeros(ctx.num_rows, grad.shape[1])
        _native.add_rows_at(_array(grad), ids.reshape(-1).contiguous().numpy(), _array(grad_weight))
        return None, grad_weight


def _sum_rows(x_MN: Tensor) -> Tensor:
    sums = torch.empty(x_MN.shape[1])
    _native.sum_rows(_array(x_MN.contiguous()), _array(sums))
    return sums


def _array(x: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    # Through numpy: nanobind reads its arrays in a tenth of the time that a tensor takes.
    array: np.ndarray[Any, np.dtype[np.float32]] = (x.detach() if x.requires_grad else x).numpy()
    return array


def _check(name: str, x: Tensor) -> None:
    if x.dtype is not torch.float32 or not x.is_cpu:
        raise UserError(
            f"{name} is {x.dtype} on {x.device}, but the exact profile computes in torch.float32 on cpu: "
            "convert it, or use profile fast"
        )
