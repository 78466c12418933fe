"""The optimizer's arithmetic in the exact profile: float32 tensors on the CPU, in place, no gradients.

The native header optim_kernels.h says which bits come out. Scalars are computed in Python's float64 and rounded to
float32 once, where they meet a tensor. Nothing calls pow: a power is a repeated product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from openbook.ops import _native

if TYPE_CHECKING:
    import numpy as np


def exact_power(base: float, exponent: int) -> float:
    """base^exponent for a whole exponent of 0 or more: 1 multiplied by `base` so many times, in float64."""
    power = 1.0
    for _ in range(exponent):
        power *= base
    return power


def exact_norm(tensors: Sequence[Tensor]) -> float:
    """The L2 norm over all tensors, a float32 number: squares of each in 16 lanes, then tensors in their order."""
    norm: float = _native.norm([_flat(tensor) for tensor in tensors])
    return norm


def exact_clip_(grads: Sequence[Tensor], max_norm: float) -> float:
    """Scale `grads` to an L2 norm of at most `max_norm`; returns the norm before, a float32 number.

    The factor is min(1, max_norm / (norm + 1e-6)) in float64, rounded. A norm that is not a number makes them all NaN.
    """
    norm = exact_norm(grads)
    factor = max_norm / (norm + 1e-6)
    if not factor >= 1.0:
        exact_scale_(grads, factor)
    return norm


def exact_scale_(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiply tensors by a number."""
    for tensor in tensors:
        _native.scale(_flat(tensor), factor)


def exact_adamw_(
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    grad: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    beta1_power: float,
    beta2_power: float,
) -> None:
    """One AdamW update (arXiv 1711.05101, algorithm 2) of `weight` and its moments, tensors of one shape.

    mean += (1 - beta1) (grad - mean); square = beta2 square + (1 - beta2) grad^2;
    weight = weight (1 - lr weight_decay) - lr / c1 * mean / (sqrt(square) / sqrt(c2) + eps), with
    c1 = 1 - beta1^t and c2 = 1 - beta2^t at update t, from 1.

    Args:
        beta1_power, beta2_power: beta1^t and beta2^t, as `exact_power` gives or as products kept from update to update.
    """
    _native.adamw(
        _flat(weight),
        _flat(mean),
        _flat(square),
        _flat(grad.contiguous()),
        decay=1.0 - lr * weight_decay,
        one_minus_beta1=1.0 - beta1,
        beta2=beta2,
        one_minus_beta2=1.0 - beta2,
        root_bias=math.sqrt(1.0 - beta2_power),
        eps=eps,
        step=lr / (1.0 - beta1_power),
    )


def exact_momentum_(momentum: Tensor, grad: Tensor, beta: float) -> Tensor:
    """Move `momentum` towards `grad` by 1 - beta; returns the Nesterov gradient grad + beta (momentum - grad), new."""
    ahead = torch.empty(grad.shape)
    _native.momentum(
        _flat(momentum), _flat(grad.contiguous()), _flat(ahead), one_minus_momentum=1.0 - beta, momentum=beta
    )
    return ahead


def exact_normalize_(matrix: Tensor) -> Tensor:
    """Divide a matrix by its Frobenius norm plus 1e-7: multiplied by the float64 reciprocal, rounded. Returns it."""
    exact_scale_([matrix], 1.0 / (exact_norm([matrix]) + 1e-7))
    return matrix


def exact_combine_(x: Tensor, y: Tensor, a: float, b: float) -> Tensor:
    """x becomes a x + b y, one rounding of b y and one of the rest; tensors of one shape. Returns x."""
    flat = _flat(x)
    _native.combine(flat, _flat(y.contiguous()), flat, a=a, b=b)
    return x


def _flat(x: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A view of contiguous x as [n]; view raises RuntimeError for others, of which no part can change in place."""
    array: np.ndarray[Any, np.dtype[np.float32]] = x.detach().view(-1).numpy()
    return array
