"""A step of many sequences at once, each with its own number of tokens, over keys and values in blocks.

All M tokens go through a model's matrices together; only attention tells sequences apart. There it takes them in
groups of like sizes: those of one token, short pieces of a prompt, and each long piece by itself.

Shapes: M tokens of a step, B sequences of a group, T tokens and S keys of each, N query heads, K key-value heads,
H head_dim, W blocks of the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openbook.models.config import CacheLayer
from openbook.models.context import Expand
from openbook.models.paged_cache import BlockPool
from openbook.models.placed_images import PlacedImages
from openbook.ops.base import AttentionMask, Ops

# A piece of more tokens than this makes full use of a product by itself.
MOST_JOINED = 64
# Sequences up to this many tokens count as equally long.
SHORT_TOKENS = 256
# Where attention is over latents: with more tokens than this for each key that is read, keys and values are made of the
# latents. See `layers/mla.py`; it decides by the tokens of a row, and this is what it has for the published sizes.
FEW_QUERIES = 64


@dataclass(frozen=True)
class _Read:
    """What a group sees in a layer. rows: int64 [B, K, S], see `BlockPool.read`; None: tokens of this step alone."""

    rows: Tensor | None
    mask: AttentionMask


@dataclass
class _Group:
    """Sequences that attention takes together.

    members: numbers of the sequences, [B]. num_tokens: T, the most that one has in this step; shorter ones are filled
    up. longest: of the sequences, in tokens. reads: by window and number of key-value heads.
    """

    members: NDArray[np.int64]
    num_tokens: int
    longest: int
    is_begin: bool  # of the sequences: all that they see is in this step
    reads: dict[tuple[int | None, int], _Read] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """B and T."""
        return len(self.members), self.num_tokens

    def kind(self, layer: CacheLayer) -> tuple[int | None, int]:
        """The key of `reads`: a window as wide as the longest sequence hides nothing."""
        hides = layer.window is not None and layer.window < self.longest
        return layer.window if hides else None, layer.num_heads


class PagedContext:
    """One forward over blocks; make a new one for each.

        context = PagedContext(pool, positions, sequences, block_tables)
        logits = model(ids.view(context.shape), context)

    Args:
        pool: takes the keys and values of the tokens.
        positions: int32 [M], of each token in its sequence, rising by one inside a sequence.
        sequences: int32 [M], ascending from 0: rows of `block_tables`.
        block_tables: int32 [sequences, W], the blocks of each in order; behind its last token anything.
        images: of these tokens; None if there are none.

    Raises:
        ValueError: arrays that do not fit each other or the pool.
    """

    def __init__(
        self,
        pool: BlockPool,
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        images: PlacedImages | None = None,
    ) -> None:
        self.images = images
        self._pool, self._tables = pool, block_tables.astype(np.int64)
        # Of each sequence: its first row in the step, tokens in the step, position of the first, and one past the last.
        self._counts = np.bincount(sequences, minlength=len(block_tables))
        self._begins = self._counts.cumsum() - self._counts
        self._check_tokens(positions, sequences)
        self._firsts = positions[self._begins].astype(np.int64)
        self._ends = self._firsts + self._counts
        self._check_blocks(positions)
        size = pool.block_tokens
        self._slots_M = self._tensor(self._tables[sequences, positions // size] * size + positions % size)
        self._groups = self._make_groups()
        self._has_begins = any(group.is_begin for group in self._groups)
        self._order, self._back = self._orders()
        self.shape = self._choose_shape()
        self.positions = self._tensor(positions.astype(np.int64)).view(self.shape)

    @property
    def is_decoding(self) -> bool:
        """Whether a sequence gets a single token behind others."""
        return bool(((self._counts == 1) & (self._firsts > 0)).any())

    def prepare(self, ops: Ops, dtype: torch.dtype) -> Self:
        """See `AttentionContext.prepare`."""
        for group in self._groups:
            for window, num_heads in {group.kind(layer) for layer in self._pool.layers}:
                read = self._begin(group, window) if group.is_begin else self._read(group, window, num_heads)
                group.reads[window, num_heads] = _Read(read.rows, ops.prepare_mask(read.mask, dtype))
        return self

    def attend(
        self,
        ops: Ops,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        scale: float,
        *,
        window: int | None = None,
        sinks: Tensor | None = None,
        expand: Expand | None = None,
    ) -> Tensor:
        """See `AttentionContext.attend`; all tensors are of `shape` first."""
        new = [k.flatten(0, 1)] if v is None else [k.flatten(0, 1), v.flatten(0, 1)]
        self._pool.write(layer, self._slots_M, new)
        new_by_group = list(zip(*map(self._by_group, new), strict=True)) if self._has_begins else []
        results = []
        for number, (group, q_BTNH) in enumerate(zip(self._groups, self._by_group(q.flatten(0, 1)), strict=True)):
            read = group.reads[group.kind(self._pool.layers[layer])]
            kept = new_by_group[number] if read.rows is None else self._pool.read(layer, read.rows)
            keys, values = expand(kept[0]) if expand is not None else kept
            results.append(ops.attention(q_BTNH, keys, values, read.mask, scale, sinks).flatten(0, 1))
        out = torch.cat(results) if len(results) > 1 else results[0]
        if self._back is not None:
            out = out.index_select(0, self._back)
        return out.view(*self.shape, *out.shape[1:])

    def _check_tokens(self, positions: NDArray[np.int32], sequences: NDArray[np.int32]) -> None:
        num_sequences = len(self._tables)
        is_ascending = np.array_equal(sequences, np.arange(len(self._counts)).repeat(self._counts))
        if (
            len(positions) != len(sequences)
            or num_sequences == 0
            or len(self._counts) != num_sequences
            or self._counts.min() == 0
            or not is_ascending
        ):
            raise ValueError(
                f"got {len(positions)} positions and sequences {sequences.tolist()} for {num_sequences} block tables: "
                "give each sequence tokens, those of the first before those of the next"
            )

    def _check_blocks(self, positions: NDArray[np.int32]) -> None:
        if self._firsts.min() < 0 or not np.array_equal(
            positions, np.arange(len(positions)) + (self._firsts - self._begins).repeat(self._counts)
        ):
            raise ValueError(f"got positions {positions.tolist()}: expected them to rise by one in a sequence, from 0")
        num_blocks, size, width = self._pool.num_blocks, self._pool.block_tokens, self._tables.shape[1]
        if self._ends.max() > width * size:
            raise ValueError(f"a sequence of {self._ends.max()} tokens does not fit {width} blocks of {size}: add some")
        used = self._tables[np.arange(width) * size < self._ends[:, None]]
        if not 0 <= used.min() <= used.max() < num_blocks:
            wrong = used.min() if used.min() < 0 else used.max()
            raise ValueError(f"block {wrong} is not there: blocks are 0 to {num_blocks - 1}")

    def _choose_shape(self) -> tuple[int, int]:
        """[M, 1] or [1, M]: nothing but latent attention asks how many tokens a row has."""
        num_tokens = len(self._slots_M)
        has_latents = any(layer.value_dim == 0 for layer in self._pool.layers)
        queries_per_key = (self._counts * self._ends).sum() / self._ends.sum()
        return (1, num_tokens) if has_latents and queries_per_key > FEW_QUERIES else (num_tokens, 1)

    def _make_groups(self) -> list[_Group]:
        """Sequences of like numbers of tokens and keys: within a factor of two of each other, as padding costs."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for sequence, (count, first) in enumerate(zip(self._counts.tolist(), self._firsts.tolist(), strict=True)):
            is_begin = first == 0 and count > 1
            key = (is_begin, count.bit_length(), max(first + count, SHORT_TOKENS).bit_length())
            groups.setdefault(key if count <= MOST_JOINED else (sequence,), []).append(sequence)
        return [
            _Group(
                np.array(members),
                int(self._counts[members].max()),
                int(self._ends[members].max()),
                is_begin=bool((self._firsts[members] == 0).all() and (self._counts[members] > 1).all()),
            )
            for members in groups.values()
        ]

    def _orders(self) -> tuple[Tensor | None, Tensor | None]:
        """From the step's order of tokens to that of the groups, and back; None where they are one.

        A group takes [B, T] tokens, behind those of a shorter sequence its last one again.
        """
        tokens, is_real = [], []
        for group in self._groups:
            columns_BT = np.arange(group.num_tokens)[None]
            last_B1 = self._counts[group.members, None] - 1
            tokens.append((self._begins[group.members, None] + np.minimum(columns_BT, last_B1)).flatten())
            is_real.append((columns_BT <= last_B1).flatten())
        order, places = np.concatenate(tokens), np.flatnonzero(np.concatenate(is_real))
        num_tokens = len(self._slots_M)
        if np.array_equal(order, np.arange(num_tokens)):
            return None, None
        back = np.empty(num_tokens, dtype=np.int64)
        back[order[places]] = places
        return self._tensor(order), self._tensor(back)

    def _by_group(self, x_M: Tensor) -> list[Tensor]:
        """x [M, ...] as [B, T, ...] of each group."""
        x = x_M if self._order is None else x_M.index_select(0, self._order)
        shapes = [group.shape for group in self._groups]
        if len(shapes) == 1:
            return [x.view(*shapes[0], *x.shape[1:])]
        parts = torch.split(x, [B * T for B, T in shapes])
        return [part.view(*shape, *x.shape[1:]) for part, shape in zip(parts, shapes, strict=True)]

    def _begin(self, group: _Group, window: int | None) -> _Read:
        """Sequences that begin here: a pass over whole rows."""
        positions_BT = torch.arange(group.num_tokens, device=self._pool.device).expand(group.shape)
        return _Read(None, AttentionMask(positions_BT, positions_BT, window=window, is_plain_causal=window is None))

    def _read(self, group: _Group, window: int | None, num_heads: int) -> _Read:
        """The slots from the first token that the first query of a sequence sees to the sequence's last one."""
        size = self._pool.block_tokens
        firsts_B1, ends_B1 = self._firsts[group.members, None], self._ends[group.members, None]
        starts_B1 = np.maximum(firsts_B1 - window + 1, 0) if window is not None else np.zeros_like(firsts_B1)
        positions_BS = starts_B1 + np.arange((ends_B1 - starts_B1).max())
        blocks_BS = np.minimum(positions_BS, ends_B1 - 1) // size
        slots_BS = self._tables[group.members[:, None], blocks_BS] * size + positions_BS % size
        # Behind a sequence's end the causal order hides what stands there.
        slots_BS = np.where(positions_BS < ends_B1, slots_BS, self._pool.empty_slot)
        rows_BKS = slots_BS[:, None] * num_heads + np.arange(num_heads)[:, None]
        queries_BT = firsts_B1 + np.arange(group.num_tokens)
        mask = AttentionMask(self._tensor(queries_BT), self._tensor(positions_BS), window=window)
        return _Read(self._tensor(rows_BKS), mask)

    def _tensor(self, values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values).to(self._pool.device)
