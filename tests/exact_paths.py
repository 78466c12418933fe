"""What tests of the exact profile share: every path through the native core, and bits to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from openbook.ops import _native as native

THREADS = (1, 2, 3, 8)
# Zeros, subnormals, what overflows, infinities, NaN.
SPECIAL = [0.0, -0.0, 1e-40, -1e-45, 1e-30, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]


@contextmanager
def kept_path() -> Iterator[None]:
    """Restores the instruction set and the number of threads."""
    isa, num_threads = native.isa(), native.num_threads()
    try:
        yield
    finally:
        native.set_isa(isa)
        native.set_num_threads(num_threads)


def paths() -> Iterator[tuple[str, int]]:
    """Every instruction set of this CPU with every number of threads, each set while the loop body runs."""
    with kept_path():
        for isa in native.available_isas():
            for num_threads in THREADS:
                native.set_isa(isa)
                native.set_num_threads(num_threads)
                yield isa, num_threads


def bits(x: Tensor | np.ndarray) -> bytes:
    """The bytes, with every NaN as one."""
    array = np.array(x.detach().numpy() if isinstance(x, Tensor) else x)
    array[np.isnan(array)] = np.nan
    return array.tobytes()


def assert_same_on_all_paths(compute: Callable[[], Sequence[Tensor]]) -> None:
    """`compute` gives tensors of the same bits on every path."""
    expected: list[bytes] | None = None
    for path in paths():
        found = [bits(x) for x in compute()]
        expected = expected or found
        assert found == expected, f"{path}: other bits than with {native.available_isas()[0]} and one thread"


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_specials(x: Tensor, seed: int = 0) -> Tensor:
    """A copy in which one number of twenty is one of `SPECIAL`."""
    generator = torch.Generator().manual_seed(seed)
    x = x.clone()
    places = torch.randperm(x.numel(), generator=generator)[: max(1, x.numel() // 20)]
    x.view(-1)[places] = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (len(places),), generator=generator)]
    return x
