"""Attention over pages: equal to the bit to a pass over whole rows, in any chunks, batch and order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from exact_paths import paths
from openbook.ops import _native
from openbook.ops.base import AttentionMask
from openbook.ops.exact_ops import ExactOps
from openbook.ops.exact_rounded_attention import RoundedCacheOps, rounded_attention

Floats = NDArray[np.float32]

LENGTHS = [75, 1, 16, 33, 130]
SCALE = 0.3


class Sequences:
    """Some sequences of random queries, keys and values, and pages full of NaN to keep them in."""

    def __init__(self, N: int, K: int, H: int, window: int = 0, has_sinks: bool = False) -> None:
        random = np.random.default_rng(0)
        self.window = window
        self.sinks = random.normal(size=N).astype(np.float32) if has_sinks else None
        self.q = [random.normal(size=(n, N, H)).astype(np.float32) for n in LENGTHS]
        self.k, self.v = ([random.normal(size=(n, K, H)).astype(np.float32) for n in LENGTHS] for _ in range(2))
        pages = random.permutation(40).astype(np.int32)
        self.tables = np.full((len(LENGTHS), 9), 39, np.int32)
        for sequence, length in enumerate(LENGTHS):
            used, pages = pages[: length // 16 + 1], pages[length // 16 + 1 :]
            self.tables[sequence, : len(used)] = used
        self.cache = self.make_cache(K, H)

    def make_cache(self, K: int, H: int) -> tuple[NDArray[Any], ...]:
        """40 pages."""
        return np.full((40, K, H, 16), np.nan, np.float32), np.full((40, K, 16, H), np.nan, np.float32)

    def write(self, *arguments: Any) -> None:
        """Puts tokens into the pages."""
        _native.write_kv(*self.cache, *arguments)

    def attend(self, q: Floats, *arguments: Any) -> None:
        """Fills the last argument."""
        _native.paged_attention(q, *self.cache, *arguments)

    def ops(self) -> ExactOps:
        """The specification."""
        return ExactOps()

    def whole(self) -> list[Floats]:
        """The result [n, N, H] of each sequence in one pass of the specification."""
        results = []
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            positions = torch.arange(len(q))[None]
            mask = AttentionMask(positions, positions, window=self.window or None)
            sinks = None if self.sinks is None else torch.from_numpy(self.sinks)
            tensors = [torch.from_numpy(x)[None] for x in (q, k, v)]
            results.append(self.ops().attention(tensors[0], tensors[1], tensors[2], mask, SCALE, sinks)[0].numpy())
        return results

    def step(self, rows: Sequence[tuple[int, int]]) -> Floats:
        """Appends the tokens (sequence, position) and returns their results [M, N, H]."""
        sequences, positions = (np.array(x, np.int32) for x in zip(*rows, strict=True))
        q, k, v = (np.stack([x[sequence][place] for sequence, place in rows]) for x in (self.q, self.k, self.v))
        self.write(self.tables, sequences, positions, k, v)
        out = np.empty_like(q)
        self.attend(q, self.tables, sequences, positions, SCALE, self.window, self.sinks, out)
        return out


class RoundedSequences(Sequences):
    """The same in pages of 8 bits."""

    def make_cache(self, K: int, H: int) -> tuple[NDArray[Any], ...]:
        return (np.full((40, K, _native.quant_page_bytes(H)), 0xFF, np.uint8),)  # as floats these bytes are NaN

    def write(self, *arguments: Any) -> None:
        _native.write_quant_kv(*self.cache, *arguments)

    def attend(self, q: Floats, *arguments: Any) -> None:
        _native.quant_paged_attention(q, *self.cache, *arguments)

    def ops(self) -> ExactOps:
        return RoundedCacheOps()


def chunks(size: int) -> Iterator[list[tuple[int, int]]]:
    """Steps in which every sequence that has tokens left gets `size` of them."""
    for start in range(0, max(LENGTHS), size):
        yield [(s, p) for s, n in enumerate(LENGTHS) for p in range(start, min(start + size, n))]


def one_by_one() -> Iterator[list[tuple[int, int]]]:
    """Each sequence alone, whole."""
    for sequence, length in enumerate(LENGTHS):
        yield [(sequence, place) for place in range(length)]


def shuffled() -> Iterator[list[tuple[int, int]]]:
    """Tokens of all sequences in disorder, first what the others need."""
    random = np.random.default_rng(1)
    for step in chunks(16):
        yield [step[i] for i in random.permutation(len(step))]


STEPS = {
    "chunks of 1": lambda: chunks(1),
    "chunks of 16": lambda: chunks(16),
    "chunks of 13": lambda: chunks(13),
    "all at once": lambda: chunks(200),
    "one by one": one_by_one,
    "shuffled": shuffled,
}


def assert_equal_to_whole(cache: Sequences, steps: Iterator[list[tuple[int, int]]], expected: list[Floats]) -> None:
    for rows in steps:
        for (sequence, place), got in zip(rows, cache.step(rows), strict=True):
            assert got.tobytes() == expected[sequence][place].tobytes()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("kind", "N", "K", "H", "window", "has_sinks"),
    [
        (Sequences, 6, 2, 32, 0, False),
        (Sequences, 3, 3, 20, 0, True),
        (Sequences, 9, 1, 16, 17, False),
        (Sequences, 4, 2, 80, 16, True),
        (RoundedSequences, 6, 2, 64, 0, False),
        (RoundedSequences, 3, 3, 32, 0, True),
        (RoundedSequences, 9, 1, 96, 17, False),
        (RoundedSequences, 4, 2, 128, 40, True),
    ],
)
def test_bits_are_those_of_one_pass(
    kind: type[Sequences], steps: str, N: int, K: int, H: int, window: int, has_sinks: bool
) -> None:
    cache = kind(N, K, H, window, has_sinks)
    assert_equal_to_whole(cache, STEPS[steps](), cache.whole())


@pytest.mark.parametrize(("kind", "H"), [(Sequences, 48), (RoundedSequences, 64)])
def test_bits_do_not_depend_on_instruction_set_or_threads(kind: type[Sequences], H: int) -> None:
    expected = kind(6, 2, H, 40, True).whole()
    for _ in paths():
        for steps in ("chunks of 16", "all at once"):
            assert_equal_to_whole(kind(6, 2, H, 40, True), STEPS[steps](), expected)


def test_one_row_over_a_long_sequence_has_the_same_bits_with_any_number_of_threads() -> None:
    random = np.random.default_rng(0)
    keys = random.normal(size=(130, 1, 72, 16)).astype(np.float32)
    values = random.normal(size=(130, 1, 16, 72)).astype(np.float32)
    q = random.normal(size=(1, 9, 72)).astype(np.float32)
    table, sequence = random.permutation(130).astype(np.int32)[None], np.zeros(1, np.int32)
    for window, position in ((0, 2073), (1500, 2050), (0, 255)):
        found = set()
        for _ in paths():
            out, place = np.empty_like(q), np.array([position], np.int32)
            _native.paged_attention(q, keys, values, table, sequence, place, 0.3, window, None, out)
            found.add(out.tobytes())
        assert len(found) == 1
        k = keys[table[0]].transpose(0, 3, 1, 2).reshape(-1, 72)[: position + 1].astype(np.float64)
        v = values[table[0]].reshape(-1, 72)[: position + 1].astype(np.float64)
        k, v = (x[-window:] if window else x for x in (k, v))
        weights = np.exp(q[0].astype(np.float64) @ k.T * 0.3)
        np.testing.assert_allclose(out[0], weights @ v / weights.sum(1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("kind", [Sequences, RoundedSequences])
def test_pages_before_the_window_are_not_read(kind: type[Sequences]) -> None:
    cache = kind(4, 2, 32, window=16)
    expected = cache.whole()
    last = LENGTHS[-1] - 1
    for rows in chunks(16):
        cache.step(rows)
    cache.tables[-1, :7] = 39  # given back, and full of NaN
    assert cache.step([(4, last)])[0].tobytes() == expected[-1][last].tobytes()


def test_rows_outside_of_the_tables_are_refused() -> None:
    cache = Sequences(4, 2, 16)
    cache.tables[0, 0] = 40
    with pytest.raises(ValueError, match=r"^paged cache: a block table names a page that is not there$"):
        cache.step([(0, 0)])
    out, places = np.empty((1, 4, 16), np.float32), np.array([9 * 16], np.int32)
    with pytest.raises(
        ValueError, match=r"^paged cache: a row's sequence or position lies outside of the block tables$"
    ):
        cache.attend(out, cache.tables, np.zeros(1, np.int32), places, 1.0, 0, None, out.copy())


def test_pages_of_8_bits_have_their_size() -> None:
    cache = RoundedSequences(4, 2, 64)
    message = r"^paged cache: expected pages uint8 \[pages, K, quant_page_bytes\(H\)\], H a multiple of 32 features$"
    for H in (32, 60):
        out, zero = np.empty((1, 4, H), np.float32), np.zeros(1, np.int32)
        with pytest.raises(ValueError, match=message):
            cache.attend(out, cache.tables, zero, zero, 1.0, 0, None, out.copy())


def test_rounding_is_close_to_float64() -> None:
    random = np.random.default_rng(3)
    q, k, v = (random.normal(size=(96, heads, 64)).astype(np.float32) for heads in (4, 2, 2))
    is_visible = np.tri(96, dtype=bool)
    got = rounded_attention(q, k, v, is_visible, 0.125, None)
    for head in range(4):
        scores = np.where(is_visible, q[:, head].astype(np.float64) @ k[:, head // 2].T * 0.125, -np.inf)
        weights = np.exp(scores)
        expected = weights / weights.sum(1, keepdims=True) @ v[:, head // 2]
        # Each of q, k, v and the weights is rounded to 1 / 254 of the largest of its block.
        assert np.abs(got[:, head] - expected).max() < 0.04 * np.abs(expected).max()


@pytest.mark.parametrize("spoiled", ["q", "k", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_nan_where_it_is_seen_only(spoiled: str, value: float) -> None:
    cache = RoundedSequences(4, 2, 64)
    tokens = getattr(cache, spoiled)[3]  # 33 of them
    tokens[20, 1, 5] = value
    expected = cache.whole()[3]
    heads = {"q": [1], "k": [2, 3], "v": [2, 3]}[spoiled]
    places = [20] if spoiled == "q" else range(20, 33)
    is_nan = np.zeros((33, 4), bool)
    is_nan[np.ix_(list(places), heads)] = True
    for isa in _native.available_isas():
        _native.set_isa(isa)
        got = cache.step([(3, place) for place in range(33)])
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(np.isnan(got).all(axis=2), is_nan)
        np.testing.assert_array_equal(np.isnan(got).any(axis=2), is_nan)


def test_large_and_subnormal_numbers_keep_their_bits() -> None:
    cache = RoundedSequences(4, 2, 32)
    for sequence, factor in enumerate((1e-39, 1e30, 1e-20, 1e18, 3e-45)):
        for tokens in (cache.q, cache.k, cache.v):
            tokens[sequence] *= np.float32(factor)
    expected = cache.whole()
    for isa in _native.available_isas():
        _native.set_isa(isa)
        for rows in chunks(16):
            for (sequence, place), got in zip(rows, cache.step(rows), strict=True):
                np.testing.assert_array_equal(got, expected[sequence][place])
