"""Elementary functions of the exact profile: errors in units of the last place, edges, the same bits on all paths."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from exact_paths import SPECIAL, bits, kept_path, native, paths

Wide = NDArray[np.float64]
SIZE = 100_003
INF, NAN = math.inf, math.nan


def stable_sigmoid(x: Wide) -> Wide:
    small = np.exp(-np.abs(x))
    return np.where(x < 0, small, 1.0) / (1.0 + small)


# Name, its definition, where it is not constant, largest error in ulp.
FUNCTIONS: list[tuple[str, Callable[[Wide], Any], tuple[float, float], float]] = [
    ("exp", np.exp, (-104.0, 88.72), 1.1),
    ("log", np.log, (1e-45, 3.4e38), 0.501),
    ("tanh", np.tanh, (-9.5, 9.5), 1.4),
    ("erf", np.vectorize(math.erf), (-4.2, 4.2), 1.2),
    ("sigmoid_forward", stable_sigmoid, (-104.0, 18.0), 2.5),
]


def ulps(actual: NDArray[np.float32], expected: Wide) -> Wide:
    spacing = np.maximum(np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64), 2.0**-149)
    return np.abs(actual.astype(np.float64) - expected) / spacing


def arguments(low: float, high: float, seed: int) -> NDArray[np.float32]:
    """Uniform, small ones, and of every exponent, all within the range."""
    rng = np.random.default_rng(seed)
    exponents = rng.uniform(-149, 127, SIZE)
    spread = np.ldexp(rng.uniform(1, 2, SIZE), exponents.astype(int)) * rng.choice([-1.0, 1.0], SIZE)
    some = np.concatenate([rng.uniform(max(low, -200), min(high, 200), SIZE), rng.uniform(-1, 1, SIZE), spread])
    some = some.astype(np.float32)
    return np.asarray(some[(some >= low) & (some <= high)])


def apply(name: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
    out = np.empty_like(x)
    getattr(native, name)(x, out)
    return out


@pytest.mark.parametrize(("name", "definition", "range_", "most"), FUNCTIONS, ids=[f[0] for f in FUNCTIONS])
def test_error(name: str, definition: Callable[[Wide], Any], range_: tuple[float, float], most: float) -> None:
    x = arguments(*range_, seed=1)
    error = ulps(apply(name, x), definition(x.astype(np.float64)))
    assert error.max() <= most, f"at {x[error.argmax()]!r}"


EDGES = [
    ("exp", 0.0, 1.0),
    ("exp", -INF, 0.0),
    ("exp", INF, INF),
    ("exp", 88.73, INF),
    ("exp", -104.0, 0.0),
    ("exp", -103.9, 2.0**-149),
    ("log", 0.0, -INF),
    ("log", -0.0, -INF),
    ("log", -1.0, NAN),
    ("log", 1.0, 0.0),
    ("log", INF, INF),
    ("tanh", INF, 1.0),
    ("tanh", -INF, -1.0),
    ("tanh", 1e-45, 1e-45),
    ("erf", INF, 1.0),
    ("erf", -5.0, -1.0),
    ("erf", 1e-45, 1e-45),
    ("sigmoid_forward", -INF, 0.0),
    ("sigmoid_forward", INF, 1.0),
    ("sigmoid_forward", 0.0, 0.5),
]


@pytest.mark.parametrize(("name", "x", "expected"), EDGES)
def test_edges(name: str, x: float, expected: float) -> None:
    assert bits(apply(name, np.array([x], np.float32))) == bits(np.array([expected], np.float32))


@pytest.mark.parametrize("name", [f[0] for f in FUNCTIONS])
def test_nan_stays(name: str) -> None:
    assert np.isnan(apply(name, np.array([NAN] * 17, np.float32))).all()


@pytest.mark.parametrize("name", [f[0] for f in FUNCTIONS])
@pytest.mark.parametrize("size", [1, 15, 16, 10_007])
def test_same_bits_on_all_paths(name: str, size: int) -> None:
    rng = np.random.default_rng(size)
    x = np.concatenate([rng.uniform(-110, 110, size).astype(np.float32), np.array(SPECIAL, np.float32)])[-size:]
    assert len({bits(apply(name, x)) for _ in paths()}) == 1


def test_a_place_in_the_array_does_not_matter() -> None:
    x = np.random.default_rng(0).uniform(-3, 3, 37).astype(np.float32)
    for name, *_ in FUNCTIONS:
        together = apply(name, x)
        assert bits(together) == b"".join(bits(apply(name, x[i : i + 1])) for i in range(len(x)))


def turn(angles: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    cos, sin = np.empty((2, len(angles), 1), np.float32)
    native.rope_tables(angles, np.ones(1, np.float32), cos, sin)
    return cos[:, 0], sin[:, 0]


def test_cos_and_sin() -> None:
    rng = np.random.default_rng(0)
    angles = np.concatenate([rng.uniform(-most, most, SIZE) for most in (1e6, 300.0, 1.0, 1e-3, 1e9)])
    # Multiples of pi / 2 are where the result has the fewest places of the argument.
    angles = np.concatenate([angles, np.arange(60_000) * (math.pi / 2)]).astype(np.float32)
    cos, sin = turn(angles)
    wide = angles.astype(np.float64)
    assert ulps(cos, np.cos(wide)).max() <= 0.501 and ulps(sin, np.sin(wide)).max() <= 0.501
    assert [float(x[0]) for x in turn(np.zeros(1, np.float32))] == [1.0, 0.0]
    for x in turn(np.array([2e9, -INF, NAN], np.float32)):
        assert np.isnan(x).all()


def test_cos_and_sin_on_all_paths() -> None:
    angles = np.random.default_rng(0).uniform(-1e6, 1e6, 3001).astype(np.float32)
    assert len({b"".join(map(bits, turn(angles))) for _ in paths()}) == 1


def test_subnormal_results_are_kept_whatever_the_caller_set() -> None:
    """torch can flush subnormals to zero in its thread: ours computes in the mode that it sets itself."""
    import torch

    x = np.full(33, -100.0, np.float32)
    expected = apply("exp", x)
    assert (expected > 0).all() and (expected < 2.0**-126).all()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        with kept_path():
            native.set_num_threads(1)
            flushed = apply("exp", x)
    finally:
        torch.set_flush_denormal(False)
    assert flushed.tobytes() == expected.tobytes()
