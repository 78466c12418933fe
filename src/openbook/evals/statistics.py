"""Statistics of a score over a sample of problems."""

from __future__ import annotations

import math
from typing import NamedTuple

Z_95 = 1.959963984540054  # 97.5% quantile of the standard normal distribution


class Interval(NamedTuple):
    """A closed range of shares, 0.0 to 1.0."""

    low: float
    high: float


def wilson_interval(num_correct: int, num_items: int, z: float = Z_95) -> Interval:
    """Score interval for a binomial share (Wilson 1927); unlike the normal one it holds near 0 and 1.

    Args:
        num_correct: successes, 0 to `num_items`.
        num_items: trials, at least 1.
        z: quantile of the standard normal; the default gives 95%.
    """
    share = num_correct / num_items
    spread = z * math.sqrt(share * (1 - share) / num_items + z * z / (4 * num_items * num_items))
    middle, scale = share + z * z / (2 * num_items), 1 + z * z / num_items
    # At 0 and at all successes the bound is exact; rounding must not move it past the share.
    low = 0.0 if num_correct == 0 else (middle - spread) / scale
    high = 1.0 if num_correct == num_items else (middle + spread) / scale
    return Interval(low, high)
