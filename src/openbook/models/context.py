"""Where a forward pass stands: positions, what each token may see, and where keys and values live.

Models own no cache and build no mask; they hand q, k, v to the context they were given.

Shapes: B batch, T query tokens, S key tokens, N query heads, K key-value heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, Self

import torch
from torch import Tensor

from openbook.models.config import ModelConfig
from openbook.ops.base import AttentionMask, Ops


class AttentionContext(Protocol):
    """What `forward` takes beside token ids."""

    @property
    def positions(self) -> Tensor:
        """Position of each token in its document or sequence, int64 [B, T]."""

    def prepare(self, ops: Ops, dtype: torch.dtype) -> AttentionContext:
        """A context to use for one forward of activations in `dtype`; the model calls it once, before its layers."""

    def attend(
        self, ops: Ops, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """Attention of q [B, T, N, H] over what it may see, k and v [B, T, K, H] included: [B, T, N, H].

        Args:
            layer: index of the decoder layer, from 0.
            scale: factor on q k^T.
            window: number of latest tokens a query sees, itself included; None for all.
        """


class _MaskedContext:
    """A pass over whole rows: keys and values are those of the pass itself."""

    def __init__(self, mask: AttentionMask) -> None:
        self._mask = mask

    @property
    def positions(self) -> Tensor:
        return self._mask.query_positions

    def prepare(self, ops: Ops, dtype: torch.dtype) -> _MaskedContext:
        return _MaskedContext(ops.prepare_mask(self._mask, dtype))

    def attend(
        self, ops: Ops, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        mask = self._mask if window is None else replace(self._mask, window=window, prepared=None)
        return ops.attention(q, k, v, mask, scale)


class DenseContext(_MaskedContext):
    """Every row is one document without padding: plain causal attention."""

    def __init__(self, batch: int, tokens: int, device: torch.device | str = "cpu") -> None:
        positions_BT = torch.arange(tokens, device=device).expand(batch, tokens)
        super().__init__(AttentionMask(positions_BT, positions_BT, is_plain_causal=True))


class PackedContext(_MaskedContext):
    """Rows hold several documents; attention stays inside each.

    Args:
        positions: int64 [B, T], from 0 in each document.
        documents: int64 [B, T], equal inside a document and unlike between the documents of a row; negative: padding.
    """

    def __init__(self, positions: Tensor, documents: Tensor) -> None:
        super().__init__(AttentionMask(positions, positions, documents, documents))


class CachedContext:
    """Keys and values of a batch of sequences of unlike lengths; each forward appends to it.

    Token p of a sequence lies in slot p, so causal masking by position is all the masking there is. One slot more, the
    last, takes what right padding writes. Memory grows with the longest sequence, up to `capacity`.

        context = CachedContext(config, batch=2, capacity=64)
        context.append([5, 3])                # the prompts' lengths
        logits = model(ids, context)          # ids [2, 5], the second row padded at the right by anything
        context.append([1, 1])
        logits = model(next_ids, context)     # ids [2, 1]

    Args:
        config: gives num_hidden_layers, num_key_value_heads and head_dim.
        batch: number of sequences.
        capacity: the longest sequence to hold, in tokens.
        dtype: of keys and values.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch, 1, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self._mask: AttentionMask | None = None
        self._slots_BT: Tensor | None = None
        self.capacity = capacity
        self.lengths = [0] * batch

    @property
    def positions(self) -> Tensor:
        return self._appended().query_positions

    def append(self, counts: Sequence[int]) -> None:
        """Announce the next forward: ids [B, max(counts)] of which the first counts[b] of row b are real.

        Raises:
            ValueError: not one count for each sequence, or a sequence would outgrow the capacity.
        """
        if len(counts) != len(self.lengths) or min(counts, default=0) < 1:
            raise ValueError(
                f"got token counts {list(counts)} for {len(self.lengths)} sequences: give each one, from 1"
            )
        lengths = [old + count for old, count in zip(self.lengths, counts, strict=True)]
        if max(lengths) > self.capacity:
            raise ValueError(
                f"a sequence of {max(lengths)} tokens does not fit the cache of {self.capacity}: enlarge it"
            )
        if max(lengths) >= self._keys[0].shape[1]:
            self._grow(min(self.capacity, max(lengths) * 3 // 2))
        device = self._keys[0].device
        steps_T = torch.arange(max(counts), device=device)
        positions_BT = torch.tensor(self.lengths, device=device)[:, None] + steps_T
        is_real_BT = steps_T < torch.tensor(list(counts), device=device)[:, None]
        self._slots_BT = torch.where(is_real_BT, positions_BT, self._keys[0].shape[1] - 1)
        key_positions_BS = torch.arange(max(lengths), device=device).expand(len(lengths), -1)
        self._mask = AttentionMask(positions_BT, key_positions_BS, is_plain_causal=max(self.lengths) == 0)
        self.lengths = lengths

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the sequences at `rows`, in that order."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self._keys[0].device)
        self._keys = [keys.index_select(0, index) for keys in self._keys]
        self._values = [values.index_select(0, index) for values in self._values]
        self.lengths = [self.lengths[row] for row in rows]
        self._mask = self._slots_BT = None

    def prepare(self, ops: Ops, dtype: torch.dtype) -> Self:
        self._mask = ops.prepare_mask(self._appended(), dtype)
        return self

    def attend(
        self, ops: Ops, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        mask = self._appended()
        keys, values = self._keys[layer], self._values[layer]
        rows_B1 = torch.arange(keys.shape[0], device=keys.device)[:, None]
        keys[rows_B1, self._slots_BT] = k
        values[rows_B1, self._slots_BT] = v
        if window is not None:
            mask = replace(mask, window=window, prepared=None)
        num_keys = mask.key_positions.shape[1]
        return ops.attention(q, keys[:, :num_keys], values[:, :num_keys], mask, scale)

    def _grow(self, num_slots: int) -> None:
        """Make room for `num_slots` tokens a sequence. Slots that hold none are zero: a masked NaN still spreads."""
        used = max(self.lengths)

        def grown(old: Tensor) -> Tensor:
            new = old.new_zeros((old.shape[0], num_slots + 1, *old.shape[2:]))
            new[:, :used] = old[:, :used]
            return new

        self._keys = [grown(keys) for keys in self._keys]
        self._values = [grown(values) for values in self._values]

    def _appended(self) -> AttentionMask:
        if self._mask is None:
            raise ValueError("call append() before the forward: it says how many tokens each sequence gets")
        return self._mask
