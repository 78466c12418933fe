"""Steps over blocks give the logits of whole rows: in any company, order and pieces, with blocks shared and copied."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from openbook.models import paged_context
from openbook.models.base import CausalModel
from openbook.models.config import CacheLayer
from openbook.models.configs.qwen_moe import Qwen3MoeConfig
from openbook.models.context import DenseContext
from openbook.models.paged_cache import BlockPool, block_bytes
from openbook.models.paged_context import PagedContext
from openbook.ops.exact_ops import ExactOps
from openbook.ops.exact_rounded_attention import RoundedCacheOps
from openbook.ops.torch_ops import TorchOps
from tiny_families import FAMILIES, SIZES, make_model

BLOCK = 16
LENGTHS = (70, 3, 33, 16, 1, 48, 17)
CLOSE = {"atol": 1e-4, "rtol": 0}

# A step: pairs of a sequence and how many tokens it gets.
Steps = Iterator[list[tuple[int, int]]]


@functools.cache
def fast(family: str) -> CausalModel:
    return make_model(FAMILIES[family], TorchOps())


@functools.cache
def exact(family: str) -> CausalModel:
    return make_model(FAMILIES[family], ExactOps())


def tokens(*lengths: int, seed: int = 0) -> list[NDArray[np.int64]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 50, length) for length in lengths]


@torch.inference_mode()
def whole(model: CausalModel, ids: NDArray[np.int64]) -> torch.Tensor:
    """Logits [T, V] of one row in one pass."""
    return model(torch.from_numpy(ids)[None], DenseContext(1, len(ids)))[0]


class Cache:
    """Sequences in blocks that lie in disorder and hold NaN where no token of theirs stands."""

    def __init__(self, model: CausalModel, sequences: Sequence[NDArray[np.int64]], num_spare: int = 0) -> None:
        self.model, self.ids = model, sequences
        width = max(-(-len(ids) // BLOCK) for ids in sequences)
        blocks = np.random.default_rng(7).permutation(len(sequences) * width + num_spare).astype(np.int32)
        self.spare, self.tables = blocks[:num_spare].tolist(), blocks[num_spare:].reshape(-1, width)
        self.pool = BlockPool(model.config, len(blocks), BLOCK)
        for kept in (tensor for tensors in self.pool._kept for tensor in tensors):
            kept[:-1] = torch.nan
        self.lengths = [0] * len(sequences)
        self.logits: list[list[torch.Tensor]] = [[] for _ in sequences]
        self.shapes: list[tuple[int, int]] = []

    @torch.inference_mode()
    def step(self, parts: Sequence[tuple[int, int]]) -> None:
        ids, positions, rows = [], [], []
        for row, (sequence, count) in enumerate(parts):
            places = np.arange(self.lengths[sequence], self.lengths[sequence] + count)
            ids.append(self.ids[sequence][places])
            positions.append(places)
            rows += [row] * count
            self.lengths[sequence] += count
        tables = self.tables[[sequence for sequence, _ in parts]]
        context = PagedContext(self.pool, np.concatenate(positions).astype(np.int32), np.array(rows, np.int32), tables)
        self.shapes.append(context.shape)
        logits = self.model(torch.from_numpy(np.concatenate(ids)).view(context.shape), context).flatten(0, 1)
        for (sequence, _), part in zip(parts, logits.split([count for _, count in parts]), strict=True):
            self.logits[sequence] += part

    def run(self, steps: Steps) -> list[torch.Tensor]:
        """The logits [T, V] of each sequence."""
        for parts in steps:
            self.step(parts)
        assert self.lengths == [len(ids) for ids in self.ids]
        return [torch.stack(rows) for rows in self.logits]


def chunks(size: int, lengths: Sequence[int] = LENGTHS) -> Steps:
    """Every sequence that has tokens left gets `size` of them."""
    for start in range(0, max(lengths), size):
        yield [(s, min(size, n - start)) for s, n in enumerate(lengths) if n > start]


def one_by_one() -> Steps:
    for sequence, length in enumerate(LENGTHS):
        yield [(sequence, length)]


def company(seed: int) -> Steps:
    """Some sequences in some order, each with a piece of its prompt or a single token."""
    random = np.random.default_rng(seed)
    left = dict(enumerate(LENGTHS))
    while left:
        parts = []
        for sequence in random.permutation(list(left)).tolist():
            count = min(left[sequence], int(random.choice([1, 1, 1, 2, 7, 16, 70])))
            if random.random() < 0.7:
                parts.append((sequence, count))
                left[sequence] -= count
        left = {sequence: count for sequence, count in left.items() if count}
        if parts:
            yield parts


STEPS: dict[str, Callable[[], Steps]] = {
    "token by token": lambda: chunks(1),
    "chunks of 13": lambda: chunks(13),
    "chunks of 16": lambda: chunks(16),
    "all at once": lambda: chunks(100),
    "one by one": one_by_one,
    "company 0": lambda: company(0),
    "company 1": lambda: company(1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_whole_rows(family: str) -> None:
    model, sequences = fast(family), tokens(*LENGTHS)
    expected = [whole(model, ids) for ids in sequences]
    assert torch.cat(expected).std() > 0.3
    for name, steps in STEPS.items():
        for found, wanted in zip(Cache(model, sequences).run(steps()), expected, strict=True):
            torch.testing.assert_close(found, wanted, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
def test_in_the_exact_profile_to_the_bit(family: str) -> None:
    model, sequences = exact(family), tokens(*LENGTHS)
    expected = [whole(model, ids) for ids in sequences]
    for name, steps in STEPS.items():
        for sequence, found in enumerate(Cache(model, sequences).run(steps())):
            assert torch.equal(found, expected[sequence]), f"{name}: sequence {sequence}"


def test_a_cache_of_8_bits_to_the_bit() -> None:
    """Its rounding goes by blocks of 32 positions, wherever a window begins."""
    config = FAMILIES["gpt_oss"]
    values = {name: getattr(config, name) for name in config.__struct_fields__}
    model = make_model(type(config)(**{**values, "head_dim": 32}), RoundedCacheOps())
    sequences = tokens(*LENGTHS)
    for sequence, found in enumerate(Cache(model, sequences).run(company(0))):
        assert torch.equal(found, whole(model, sequences[sequence]))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "mistral"])
@pytest.mark.parametrize("make", [fast, exact])
def test_sequences_share_blocks_and_go_on_from_copies(make: Callable[[str], CausalModel], family: str) -> None:
    model = make(family)
    begin = tokens(40, seed=1)[0]
    sequences = [np.concatenate([begin, rest]) for rest in tokens(9, 30, 1, seed=2)]
    cache = Cache(model, sequences, num_spare=3)
    # The first computes what all begin with: two blocks, which the others look at, and half of one, which is copied.
    cache.step([(0, len(begin))])
    for sequence in (1, 2):
        cache.tables[sequence, :2] = cache.tables[0, :2]
        cache.pool.copy(int(cache.tables[0, 2]), int(cache.tables[sequence, 2]))
        cache.lengths[sequence] = len(begin)
    for parts in ([(1, 5), (0, 1), (2, 1)], [(0, 8)], [(1, 1)], [(1, 24)]):
        cache.step(parts)
    for rows, ids in zip(cache.logits, sequences, strict=True):
        expected = whole(model, ids)
        found = torch.stack(rows)
        torch.testing.assert_close(
            found, expected[-len(found) :], **(CLOSE if make is fast else {"atol": 0, "rtol": 0})
        )


def test_nothing_in_front_of_a_window_is_read() -> None:
    model, (ids,) = fast("mistral"), tokens(60)
    window = model.config.window(0)
    assert window == 21
    cache = Cache(model, [ids])
    cache.step([(0, 50)])
    first = 50 - window + 1
    slots = [int(cache.tables[0, place // BLOCK]) * BLOCK + place % BLOCK for place in range(first)]
    for kept in (tensor for tensors in cache.pool._kept for tensor in tensors):
        kept[slots] = torch.nan
    cache.step([(0, 10)])
    assert torch.stack(cache.logits[0]).isfinite().all()


@pytest.mark.parametrize("few", [0, 1000])
def test_latents_are_absorbed_where_few_look_at_each_and_expanded_where_many(
    few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sequences = fast("deepseek_v2"), tokens(100, 8, 9)
    expected = [whole(model, ids) for ids in sequences]
    lengths = [100, 8, 9]
    cache = Cache(model, sequences)
    cache.run(chunks(90, lengths))
    assert cache.shapes == [(1, 107), (10, 1)]
    monkeypatch.setattr(paged_context, "FEW_QUERIES", few)
    again = Cache(model, sequences)
    for found, other, wanted in zip(
        again.run(chunks(90, lengths)), map(torch.stack, cache.logits), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted, **CLOSE)
        torch.testing.assert_close(other, wanted, **CLOSE)
    assert again.shapes == ([(1, 107), (1, 10)] if few == 0 else [(107, 1), (10, 1)])


def test_attention_takes_sequences_of_like_sizes_together() -> None:
    """Short sequences are not filled up to the length of a long one, nor short pieces to a long piece's."""
    seen: set[tuple[int, int, int]] = set()

    class Watching(TorchOps):
        def attention(self, q: Any, k: Any, *rest: Any) -> Any:
            seen.add((*q.shape[:2], k.shape[1]))
            return super().attention(q, k, *rest)

    cache = Cache(make_model(FAMILIES["qwen3"], Watching()), tokens(30, 30, 30, 29, 30, 700))
    for parts, expected in (
        ([(0, 20), (1, 20), (2, 17), (3, 20), (4, 3), (5, 690)], {(4, 20, 20), (1, 3, 3), (1, 690, 690)}),
        ([(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1)], {(5, 1, 21), (1, 1, 691)}),
        ([(0, 5), (1, 7), (2, 1), (3, 8), (5, 4)], {(2, 7, 28), (1, 8, 29), (1, 1, 19), (1, 4, 695)}),
    ):
        seen.clear()
        cache.step(parts)
        assert seen == expected


def test_what_a_block_takes() -> None:
    for family, config in FAMILIES.items():
        for dtype in (torch.float32, torch.bfloat16):
            pool = BlockPool(config, 3, BLOCK, dtype)
            kept = [tensor for tensors in pool._kept for tensor in tensors]
            in_blocks = sum(tensor[:-1].nbytes for tensor in kept)
            assert in_blocks == 3 * block_bytes(config, BLOCK, dtype), family
            assert all(tensor.dtype == dtype and not tensor.any() for tensor in kept)
    assert block_bytes(FAMILIES["deepseek_v2"], BLOCK, torch.bfloat16) == 2 * 16 * (16 + 4) * 2
    assert block_bytes(FAMILIES["qwen3"], BLOCK, torch.float32) == 2 * 16 * 2 * (8 + 8) * 4


def test_copies_are_of_blocks_that_are_there() -> None:
    pool = BlockPool(FAMILIES["qwen3"], 4, BLOCK)
    for source, target in ((4, 0), (0, 4), (-1, 2)):
        with pytest.raises(ValueError, match=f"^cannot copy block {source} to {target}: blocks are 0 to 3$"):
            pool.copy(source, target)


@pytest.mark.parametrize(
    ("positions", "sequences", "tables", "line"),
    [
        ([0, 1], [0], [[0]], r"^got 2 positions and sequences \[0\] for 1 block tables: give each sequence tokens"),
        ([0, 0], [1, 0], [[0], [1]], r"sequences \[1, 0\] for 2 block tables: give each sequence tokens, those of the"),
        ([0], [0], [[0], [1]], r"sequences \[0\] for 2 block tables"),
        ([0, 0], [0, 2], [[0], [1]], r"sequences \[0, 2\] for 2 block tables"),
        ([], [], np.zeros((0, 1)), r"^got 0 positions and sequences \[\] for 0 block tables"),
        ([0, 2], [0, 0], [[0]], r"^got positions \[0, 2\]: expected them to rise by one in a sequence, from 0"),
        ([-1, 0], [0, 0], [[0]], r"^got positions \[-1, 0\]: expected"),
        ([16], [0], [[0]], r"^a sequence of 17 tokens does not fit 1 blocks of 16: add some"),
        ([16], [0], [[4, 0]], r"^block 4 is not there: blocks are 0 to 3"),
        ([16], [0], [[0, -1]], r"^block -1 is not there: blocks are 0 to 3"),
    ],
)
def test_steps_that_do_not_fit_are_refused(positions: Any, sequences: Any, tables: Any, line: str) -> None:
    pool = BlockPool(FAMILIES["qwen3"], 4, BLOCK)
    arrays = [np.array(values, np.int32) for values in (positions, sequences, tables)]
    with pytest.raises(ValueError, match=line):
        PagedContext(pool, *arrays)


def test_blocks_behind_the_last_token_may_be_anything() -> None:
    pool = BlockPool(FAMILIES["qwen3"], 4, BLOCK)
    tables = np.array([[2, -7, 99]], np.int32)
    assert PagedContext(pool, np.array([15], np.int32), np.zeros(1, np.int32), tables).positions.tolist() == [[15]]


def test_layers_may_keep_unlike_things() -> None:
    """Heads, sizes and windows of their own in every layer."""

    class Mixed(Qwen3MoeConfig, frozen=True, kw_only=True):
        @property
        def cache_layers(self) -> tuple[CacheLayer, ...]:
            return CacheLayer(2, 8, 4, None), CacheLayer(1, 6, 6, 3)

    config = Mixed(**SIZES, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)
    pool, ops = BlockPool(config, 4, BLOCK), TorchOps()
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    per_layer = [(rand(20, 4, k), rand(20, K, k), rand(20, K, v), w) for K, k, v, w in config.cache_layers]
    for start, end in ((0, 18), (18, 20)):
        positions = np.arange(start, end, dtype=np.int32)
        context = PagedContext(pool, positions, np.zeros(end - start, np.int32), np.array([[3, 1]], np.int32))
        context.prepare(ops, torch.float32)
        for layer, (q, k, v, window) in enumerate(per_layer):
            new = [x[start:end].view(*context.shape, *x.shape[1:]) for x in (q, k, v)]
            found = context.attend(ops, layer, *new, 0.3, window=window)
            dense = DenseContext(1, 20).prepare(ops, torch.float32)
            expected = dense.attend(ops, layer, q[None], k[None], v[None], 0.3, window=window)
            torch.testing.assert_close(found.flatten(0, 1), expected[0, start:end], **CLOSE)
