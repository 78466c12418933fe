"""Rotary position embedding tables (arXiv 2104.09864), for halves paired as (i, i + H/2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openbook.models.config import RopeScaling
from openbook.models.rope_frequencies import exact_frequencies
from openbook.ops.base import Ops


def rope_tables(
    ops: Ops, positions: Tensor, dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, computed in float32: each [B, T, dim / 2] in `dtype`.

    Frequency j is theta^(-2j / dim), changed as `scaling` says.

    Args:
        positions: int64 [B, T].
        dim: number of features that are rotated.
    """
    if ops.is_exact:
        exact, factor = exact_frequencies(dim, theta, scaling)
        frequencies_J = torch.tensor(exact, dtype=torch.float32)
    else:
        exponents_J = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
        frequencies_J, factor = 1.0 / theta**exponents_J, 1.0
        if scaling is not None:
            frequencies_J, factor = scale_frequencies(frequencies_J, theta, scaling)
    cos, sin = ops.rope_tables(positions, frequencies_J)
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return cos.to(dtype), sin.to(dtype)


def scale_frequencies(frequencies_J: Tensor, theta: float, scaling: RopeScaling) -> tuple[Tensor, float]:
    """The scaled frequencies, float32 [J], and the factor on cos and sin."""
    if scaling.rope_type == "linear":
        return frequencies_J / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(frequencies_J, scaling), 1.0
    return _yarn(frequencies_J, theta, scaling), attention_factor(scaling)


def _llama3(frequencies_J: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1 (apply_scaling in its reference code): long waves slowed, short ones kept, blended between."""
    assert scaling.original_max_position_embeddings is not None
    rotations_J = scaling.original_max_position_embeddings * frequencies_J / (2.0 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share_J = ((rotations_J - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - share_J) * frequencies_J / scaling.factor + share_J * frequencies_J


def _yarn(frequencies_J: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """arXiv 2309.00071, section 3.2, with the ramp over dimensions as in its reference code."""
    assert scaling.original_max_position_embeddings is not None
    dim = 2 * len(frequencies_J)

    def dimension(rotations: float) -> float:
        """Where a frequency makes that many rotations over the original context."""
        context = scaling.original_max_position_embeddings or 0
        return dim * math.log(context / (rotations * 2.0 * math.pi)) / (2.0 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    indices_J = torch.arange(len(frequencies_J), device=frequencies_J.device, dtype=torch.float32)
    ramp_J = ((indices_J - low) / (high - low if high != low else 0.001)).clamp(0.0, 1.0)
    return frequencies_J / scaling.factor * ramp_J + frequencies_J * (1.0 - ramp_J)


def attention_factor(scaling: RopeScaling) -> float:
    """YaRN's factor on cos and sin (arXiv 2309.00071, section 3.4; with DeepSeek's mscale and mscale_all_dim)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1 (arXiv 2309.00071, equation 22), 1 where nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0
