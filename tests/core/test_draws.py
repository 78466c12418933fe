"""Normal numbers: the distribution, and bits that never change."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from openbook.core.draws import _log, draw_normal

GOLDEN_FIRST = ["-0x1.73eaaf47cf164p-1", "0x1.c4ea0d1dfc1e7p-2", "0x1.830522deae924p-2"]
GOLDEN_SHA256 = "76cba5aa24bb57934a54c0317cc894fec6a7d856a32b526b4a8b2a2fb7235192"


def test_moments_and_distribution_are_those_of_the_normal() -> None:
    count = 200_000
    x = draw_normal(1, count)
    for power, expected, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(float((x**power).mean()) - expected) < 4.0 * math.sqrt(variance / count)
    ordered = np.sort(x)
    exact = np.array([0.5 * math.erfc(-value / math.sqrt(2.0)) for value in ordered])
    steps = np.arange(count + 1) / count
    distance = max(float(np.abs(exact - steps[:-1]).max()), float(np.abs(exact - steps[1:]).max()))
    assert distance < 1.63 / math.sqrt(count)  # Kolmogorov and Smirnov's limit at 1%


def test_seeds_give_unrelated_numbers_and_the_beginning_does_not_depend_on_the_count() -> None:
    a, b = draw_normal(7, 100_000), draw_normal(8, 100_000)
    assert abs(float(np.corrcoef(a, b)[0, 1])) < 4.0 / math.sqrt(len(a))
    for count in (0, 1, 2, 4095, 4096, 50_001):
        np.testing.assert_array_equal(draw_normal(7, count), a[:count])


def test_the_bits_are_the_stored_ones() -> None:
    """If this fails, every model that was built before can no longer be built again."""
    x = draw_normal(20261123, 100_000)
    assert [value.hex() for value in x[:3].tolist()] == GOLDEN_FIRST
    assert hashlib.sha256(x.astype("<f8").tobytes()).hexdigest() == GOLDEN_SHA256


def test_the_logarithm_is_accurate() -> None:
    x = np.concatenate([np.geomspace(1e-32, 1.0, 10_001), 1.0 - np.geomspace(1e-16, 0.5, 1001)])
    np.testing.assert_allclose(_log(x), np.log(x), rtol=1e-15)
