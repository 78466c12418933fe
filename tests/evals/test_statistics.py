"""The Wilson interval against published values and its own definition."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openbook.evals.statistics import Z_95, wilson_interval


@pytest.mark.parametrize(
    ("correct", "items", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17, 857), table I, method 3: 81/263, 15/148, 0/20, 1/29
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_published_values(correct: int, items: int, low: float, high: float) -> None:
    interval = wilson_interval(correct, items)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


@given(st.integers(1, 500).flatmap(lambda items: st.tuples(st.integers(0, items), st.just(items))))
def test_bounds_solve_the_score_equation_and_hold_the_share(counts: tuple[int, int]) -> None:
    correct, items = counts
    share = correct / items
    interval = wilson_interval(correct, items)
    assert 0 <= interval.low <= share <= interval.high <= 1
    for bound in interval:
        # |share - p| = z sqrt(p (1 - p) / n), by which the interval is defined
        assert math.isclose(abs(share - bound), Z_95 * math.sqrt(bound * (1 - bound) / items), abs_tol=1e-9)
