"""Gradients written out for eager training on CPU: fewer passes over memory than autograd makes of the same formulas.

Compiled training does not come here; the compiler fuses the plain formulas better.

Shapes: B batch, T tokens, N heads, H head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, N, H] rotated by cos and sin [B, T, H/2], halves paired."""
    cos_BT1J, sin_BT1J = cos[:, :, None, :], sin[:, :, None, :]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos_BT1J - second * sin_BT1J, second * cos_BT1J + first * sin_BT1J), dim=-1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """`rotate` (backward if `sign` is -1) without tensors between: each half is written where it belongs."""
    cos_BT1J, sin_BT1J = cos[:, :, None, :], sin[:, :, None, :]
    out = torch.empty(x.shape, dtype=x.dtype)
    (first, second), (first_out, second_out) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos_BT1J, out=first_out).addcmul_(second, sin_BT1J, value=-sign)
    torch.mul(second, cos_BT1J, out=second_out).addcmul_(first, sin_BT1J, value=sign)
    return out


class Rope(torch.autograd.Function):
    """`rotate`, whose gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, -1), None, None


class RMSNorm(torch.autograd.Function):
    """x / r * weight with r = sqrt(mean(x^2) + eps), r in float32 (arXiv 1910.07467).

    With y = x / r and h = grad * weight: dx = (h - y * mean(h * y)) / r, dweight = the sum of grad * y over all rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x)).square_()
        inverse = square.div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        y: Tensor = x * inverse
        ctx.save_for_backward(y, inverse, weight)
        out: Tensor = y * weight
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        y, inverse, weight = ctx.saved_tensors
        product = grads[0] * y
        dweight = product.flatten(0, -2).sum(0)
        total = product.mul_(weight).sum(-1, keepdim=True, dtype=_wide(y))
        mean = total.div_(y.shape[-1]).to(y.dtype)
        # `product` has served; its memory is taken again, as fresh memory costs more than a pass over it.
        dx = torch.mul(grads[0], weight, out=product).addcmul_(y, mean, value=-1).mul_(inverse)
        return dx, dweight, None


class SiLUMul(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202); both halves of the gradient are written where they belong."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        silu = F.silu(gate)
        ctx.save_for_backward(gate_up, silu)
        return silu * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        gate_up, silu = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        dgate_up = torch.empty_like(gate_up)
        dgate, dup = dgate_up.chunk(2, dim=-1)
        torch.mul(grads[0], silu, out=dup)
        torch.mul(grads[0], up, out=dgate)
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        return dgate_up


class Take(torch.autograd.Function):
    """Some rows of a matrix, each at most once: their gradient is copied into zeros, not added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        dx = grads[0].new_zeros((ctx.num_rows, *grads[0].shape[1:]))
        return dx.index_copy_(0, rows, grads[0]), None


def _wide(x: Tensor) -> torch.dtype:
    """The dtype to add up in: float32, or the tensor's own if that is wider."""
    wide: torch.dtype = torch.promote_types(x.dtype, torch.float32)
    return wide
