"""Gradients written out for eager training on CPU: fewer passes over memory than autograd makes of the same formulas.

Compiled training does not come here; the compiler fuses the plain formulas better.

Shapes: B batch, T tokens, N heads, H head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, N, H] rotated by cos and sin [B, T, H/2], halves paired."""
    cos_BT1J, sin_BT1J = cos[:, :, None, :], sin[:, :, None, :]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos_BT1J - second * sin_BT1J, second * cos_BT1J + first * sin_BT1J), dim=-1)


class Rope(torch.autograd.Function):
    """`rotate`, whose gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grads[0], cos, -sin), None, None


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
        rows = product.reshape(-1, y.shape[-1])
        dweight = rows.sum(0)
        # mean(grad * weight * y) as a matrix-vector product, which adds up in float32.
        mean = (product @ weight).div_(y.shape[-1])[..., None]
        dx = (grads[0] * weight).sub_(y * mean).mul_(inverse)
        return dx, dweight, None


def _wide(x: Tensor) -> torch.dtype:
    """The dtype to add up in: float32, or the tensor's own if that is wider."""
    wide: torch.dtype = torch.promote_types(x.dtype, torch.float32)
    return wide
