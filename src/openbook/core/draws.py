"""Random numbers of which every bit is fixed: the same on every machine, instruction set and version of numpy.

Integers come from Philox 4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), whose raw words
numpy promises never to change. What follows is float64 addition, subtraction, multiplication, division and square root,
one numpy call each: IEEE 754 leaves no choice there, and nothing goes through a library's logarithm or cosine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BLOCK_WORDS = 2**12  # drawn at a time; decides no number
_HALF_ROOT = 0.7071067811865476  # sqrt(1/2), where a mantissa's logarithm changes sides


def draw_normal(seed: int, count: int) -> NDArray[np.float64]:
    """`count` numbers of the standard normal distribution; the first ones do not depend on how many are asked for.

    The polar method (Marsaglia and Bray, "A convenient method for generating normal variables", 1964): a point (u, v)
    uniform in the unit disc, other than its centre, with s = u^2 + v^2 gives u f and v f, f = sqrt(-2 ln(s) / s).

    Args:
        seed: the generator's key, from 0 to 2^128 - 1.
    """
    words = np.random.Philox(key=seed)
    parts: list[NDArray[np.float64]] = [np.empty((0, 2))]
    while 2 * sum(len(part) for part in parts) < count:
        # The upper 53 bits of each word: multiples of 2^-52 from -1 to below 1, exactly.
        points = (words.random_raw(_BLOCK_WORDS) >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
        pairs = points.reshape(-1, 2)
        squares = pairs * pairs
        size = squares[:, 0] + squares[:, 1]
        is_inside = (size < 1.0) & (size > 0.0)
        pairs, size = pairs[is_inside], size[is_inside]
        parts.append(pairs * np.sqrt(_log(size) * -2.0 / size)[:, None])
    return np.concatenate(parts).reshape(-1)[:count]


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """ln x of normal positive numbers, to a few units of the last place.

    x = 2^e m with m within sqrt(1/2) and sqrt(2); with s = (m - 1) / (m + 1), ln m = 2 (s + s^3 / 3 + s^5 / 5 + ...).
    """
    mantissa, exponent = np.frexp(x)
    is_small = mantissa < _HALF_ROOT
    mantissa = np.where(is_small, mantissa * 2.0, mantissa)
    exponent = exponent - is_small
    s = (mantissa - 1.0) / (mantissa + 1.0)
    t = s * s
    series = np.zeros_like(s)
    for odd in range(23, 0, -2):  # s^2 is at most 0.0295, so that the first term left out is below 2^-60 of the sum
        series = series * t + 1.0 / odd
    return exponent * 0.6931471805599453 + s * series * 2.0
