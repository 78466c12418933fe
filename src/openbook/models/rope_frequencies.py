"""Rotary frequencies for the exact profile: computed in decimal, so that no machine's libm decides a bit. No torch."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, localcontext
from functools import lru_cache

from openbook.models.config import RopeScaling

_PI = Decimal("3.14159265358979323846264338327950288419716939937510")
_DIGITS = 40


@lru_cache(maxsize=64)
def exact_frequencies(dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[tuple[float, ...], float]:
    """What rotates `dim` features: dim / 2 frequencies, and the factor on cos and sin.

    Frequency j is theta^(-2j / dim), changed as `scaling` says by the formulas of `models.layers.rope`. All is computed
    to 40 digits and rounded once to float64; the caller rounds to float32.
    """
    with localcontext(Context(prec=_DIGITS)):
        log_theta = Decimal(theta).ln()
        frequencies = [(log_theta * (-2 * j) / dim).exp() for j in range((dim + 1) // 2)]
        factor = Decimal(1)
        if scaling is not None and scaling.rope_type == "linear":
            frequencies = [frequency / Decimal(scaling.factor) for frequency in frequencies]
        elif scaling is not None and scaling.rope_type == "llama3":
            frequencies = [_llama3(frequency, scaling) for frequency in frequencies]
        elif scaling is not None:
            frequencies = _yarn(frequencies, log_theta, scaling)
            factor = _attention_factor(scaling)
        return tuple(float(frequency) for frequency in frequencies), float(factor)


def _llama3(frequency: Decimal, scaling: RopeScaling) -> Decimal:
    rotations = Decimal(scaling.original_max_position_embeddings or 0) * frequency / (2 * _PI)
    low, high = Decimal(scaling.low_freq_factor), Decimal(scaling.high_freq_factor)
    share = _within_one((rotations - low) / (high - low))
    return (1 - share) * frequency / Decimal(scaling.factor) + share * frequency


def _yarn(frequencies: list[Decimal], log_theta: Decimal, scaling: RopeScaling) -> list[Decimal]:
    dim = 2 * len(frequencies)

    def dimension(rotations: float) -> Decimal:
        context = Decimal(scaling.original_max_position_embeddings or 0)
        return dim * (context / (Decimal(rotations) * 2 * _PI)).ln() / (2 * log_theta)

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = low.to_integral_value(ROUND_FLOOR), high.to_integral_value(ROUND_CEILING)
    low, high = max(low, Decimal(0)), min(high, Decimal(dim - 1))
    width = high - low if high != low else Decimal("0.001")
    ramps = [_within_one((index - low) / width) for index in range(len(frequencies))]
    return [
        frequency / Decimal(scaling.factor) * ramp + frequency * (1 - ramp)
        for frequency, ramp in zip(frequencies, ramps, strict=True)
    ]


def _attention_factor(scaling: RopeScaling) -> Decimal:
    if scaling.attention_factor is not None:
        return Decimal(scaling.attention_factor)
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def _mscale(factor: float, mscale: float) -> Decimal:
    return Decimal("0.1") * Decimal(mscale) * Decimal(factor).ln() + 1 if factor > 1.0 else Decimal(1)


def _within_one(x: Decimal) -> Decimal:
    return min(max(x, Decimal(0)), Decimal(1))
