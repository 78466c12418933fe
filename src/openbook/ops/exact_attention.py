"""Attention in the exact profile: native/attention.h says which bits come out.

A mask becomes a plan: for each document of each row its keys in the order of their positions, its queries in that
order, and the range of these keys that a query sees. So padding, ring buffers and packed rows are one case.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, H and Hv features of a head.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from openbook.core.errors import UserError
from openbook.ops import _native
from openbook.ops.base import AttentionMask

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Lanes that a denominator is added up in.
_NUM_LANES = 16


@dataclass(frozen=True)
class AttentionPlan:
    """Which query sees which keys; all arrays int32.

    Attributes:
        segments: [num_segments, 6], one a document and row: row, position of the first key modulo 16, range of `keys`,
            range of `queries`. Long ones stand first, so that threads end together.
        keys: token (0 to S - 1) of each key.
        queries: token (0 to T - 1) of each query.
        visible_begin: of each query the first key that it sees, counted from the first of its segment.
        visible_end: and one behind the last.
        has_all_queries: whether each of the B * T queries is in a segment; the others get zeros.
        has_all_keys: the same of keys and their gradients.
    """

    segments: NDArray[np.int32]
    keys: NDArray[np.int32]
    queries: NDArray[np.int32]
    visible_begin: NDArray[np.int32]
    visible_end: NDArray[np.int32]
    has_all_queries: bool
    has_all_keys: bool

    @property
    def arrays(self) -> tuple[NDArray[np.int32], ...]:
        """In the order of the native functions."""
        return self.segments, self.keys, self.queries, self.visible_begin, self.visible_end


def prepare_exact_mask(mask: AttentionMask) -> AttentionMask:
    """The mask with its plan as `prepared`: once a batch, as all layers and both directions use it.

    Raises:
        UserError: the positions of a document's keys are not whole numbers that rise by one.
    """
    return mask if isinstance(mask.prepared, AttentionPlan) else replace(mask, prepared=plan_attention(mask))


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """softmax(q k^T * scale, masked) v: q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv] to [B, T, N, Hv].

    All float32, with gradients. Any strides do, as long as the features of a head lie together. A query that sees no
    key gets zeros.

    Args:
        mask: None if every query sees every key; there are no sinks then.
        scale: factor on q k^T.
        sinks: [N], one more score for each head, which takes part in the softmax and has no value.

    Raises:
        UserError: another dtype or device, shapes that do not fit, or keys whose positions have gaps.
    """
    for name, x in (("q", q), ("k", k), ("v", v), ("sinks", sinks)):
        if x is not None and (x.dtype != torch.float32 or x.device.type != "cpu"):
            raise UserError(
                f"{name} is {x.dtype} on {x.device}: the exact profile computes in torch.float32 on the CPU; convert it"
            )
    if (
        not q.dim() == k.dim() == v.dim() == 4
        or not q.shape[0] == k.shape[0] == v.shape[0]
        or k.shape[1:3] != v.shape[1:3]
        or q.shape[3] != k.shape[3]
        or k.shape[2] == 0
        or q.shape[2] % k.shape[2] != 0
    ):
        raise UserError(
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: expected [B, T, N, H], [B, S, K, H], "
            "[B, S, K, Hv] with K a divisor of N; check the shapes"
        )
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise UserError(f"sinks have shape {list(sinks.shape)}, expected one a head: [{q.shape[2]}]; correct them")
    if mask is None:
        plan = _plan_for_all(q.shape[0], q.shape[1], k.shape[1])
    else:
        if mask.query_positions.shape != q.shape[:2] or mask.key_positions.shape != k.shape[:2]:
            raise UserError(
                f"the mask is for queries {list(mask.query_positions.shape)} and keys "
                f"{list(mask.key_positions.shape)}, but got {list(q.shape[:2])} and {list(k.shape[:2])}; make it for "
                "this batch"
            )
        plan = prepare_exact_mask(mask).prepared
    out: Tensor = ExactAttention.apply(q, k, v, plan, scale, sinks)  # type: ignore[no-untyped-call]
    return out


class ExactAttention(torch.autograd.Function):
    """`exact_attention`, its arguments known to fit."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, sinks: Tensor | None
    ) -> Tensor:
        """See `exact_attention`."""
        q, k, v = (_with_joined_features(x) for x in (q, k, v))
        sinks = None if sinks is None else sinks.contiguous()
        out = _new((*q.shape[:3], v.shape[3]), plan.has_all_queries)
        # What the backward pass needs of each row: the largest score, and 1 / denominator.
        stats = torch.empty((2, *q.shape[:3])) if any(ctx.needs_input_grad) else None
        _native.attention_forward(
            *map(_array, (q, k, v)), _maybe_array(sinks), *plan.arrays, scale, _array(out), _maybe_array(stats)
        )
        if stats is not None:
            ctx.save_for_backward(q, k, v, out, stats, sinks)
            ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all arguments."""
        q, k, v, out, stats, sinks = ctx.saved_tensors
        plan = ctx.plan
        dq = _new(q.shape, plan.has_all_queries)
        dk, dv = (_new(x.shape, plan.has_all_keys) for x in (k, v))
        dsinks = None if sinks is None else torch.empty_like(sinks)
        _native.attention_backward(
            *map(_array, (_with_joined_features(grad), q, k, v, out, stats)),
            _maybe_array(sinks),
            *plan.arrays,
            ctx.scale,
            *map(_array, (dq, dk, dv)),
            _maybe_array(dsinks),
        )
        return dq, dk, dv, None, None, dsinks


def plan_attention(mask: AttentionMask) -> AttentionPlan:
    """The plan of a mask; see `prepare_exact_mask`."""
    query_positions, key_positions = mask.query_positions.numpy(), mask.key_positions.numpy()
    (B, T), S = query_positions.shape, key_positions.shape[1]
    query_documents = np.zeros((B, T), np.int64) if mask.query_documents is None else mask.query_documents.numpy()
    key_documents = np.zeros((B, S), np.int64) if mask.key_documents is None else mask.key_documents.numpy()
    # Keys past every query are hidden from all: slots that hold nothing are such.
    last_B1 = query_positions.max(axis=1, initial=-1, keepdims=True)
    queries = _Tokens(query_positions, query_documents, query_documents >= 0)
    keys = _Tokens(key_positions, key_documents, (key_documents >= 0) & (key_positions <= last_B1))
    if not keys.is_dense:
        raise UserError(
            "the positions of a document's keys have gaps or repeat: exact attention expects them to rise by one; "
            "give each key its place in the document"
        )
    _, of_queries, of_keys = np.intersect1d(queries.names, keys.names, assume_unique=True, return_indices=True)
    num_keys = keys.counts[of_keys]
    # By query: the segment's first position, and how many keys it has.
    first, size = np.zeros((2, len(queries.counts)), np.int64)
    first[of_queries], size[of_queries] = keys.positions[keys.begins[of_keys]], num_keys
    first, size = first.repeat(queries.counts), size.repeat(queries.counts)
    visible_end = np.clip(queries.positions - first + 1, 0, size)
    if mask.window is None:
        visible_begin = np.zeros_like(visible_end)
    else:
        visible_begin = np.clip(queries.positions - first + 1 - mask.window, 0, size)
    segments = np.stack(
        [
            keys.rows[keys.begins[of_keys]],
            keys.positions[keys.begins[of_keys]] % _NUM_LANES,
            keys.begins[of_keys],
            keys.begins[of_keys] + num_keys,
            queries.begins[of_queries],
            queries.begins[of_queries] + queries.counts[of_queries],
        ],
        axis=1,
    )
    order = np.argsort(-num_keys * queries.counts[of_queries], kind="stable")
    return AttentionPlan(
        segments[order].astype(np.int32),
        keys.tokens.astype(np.int32),
        queries.tokens.astype(np.int32),
        visible_begin.astype(np.int32),
        visible_end.astype(np.int32),
        has_all_queries=bool(queries.counts[of_queries].sum() == B * T),
        has_all_keys=bool(num_keys.sum() == B * S),
    )


class _Tokens:
    """The tokens of all rows that count, document by document and by position.

    Attributes, each of them in this order:
        rows, tokens, positions: of each token.
        names, begins, counts: of each document; equal names are the same row and document.
        is_dense: whether the positions of each document rise by one.
    """

    def __init__(
        self, positions: NDArray[np.int64], documents: NDArray[np.int64], is_counted: NDArray[np.bool_]
    ) -> None:
        rows, tokens = is_counted.nonzero()
        position, document = positions[rows, tokens], documents[rows, tokens]
        # Packed rows come in order nearly always; documents of a row may come in any.
        order = np.lexsort((position, document, rows))
        self.rows, self.tokens, self.positions, document = rows[order], tokens[order], position[order], document[order]
        is_first = np.ones(len(order), bool)
        is_first[1:] = (np.diff(self.rows) != 0) | (np.diff(document) != 0)
        self.begins = is_first.nonzero()[0]
        self.counts = np.diff(self.begins, append=len(order))
        # A row and a document in one number; documents are numbered well below this.
        self.names = self.rows[self.begins] * 2**40 + document[self.begins]
        self.is_dense = bool((is_first[1:] | (np.diff(self.positions) == 1)).all())


@functools.lru_cache(maxsize=8)
def _plan_for_all(batch: int, num_queries: int, num_keys: int) -> AttentionPlan:
    """Every query sees every key of its row."""
    rows = np.arange(batch)
    segments = np.zeros((batch if num_keys and num_queries else 0, 6), np.int32)
    if len(segments):
        segments[:, 0] = rows
        segments[:, 2], segments[:, 3] = rows * num_keys, (rows + 1) * num_keys
        segments[:, 4], segments[:, 5] = rows * num_queries, (rows + 1) * num_queries
    return AttentionPlan(
        segments,
        np.tile(np.arange(num_keys, dtype=np.int32), batch),
        np.tile(np.arange(num_queries, dtype=np.int32), batch),
        np.zeros(batch * num_queries, np.int32),
        np.full(batch * num_queries, num_keys, np.int32),
        has_all_queries=num_keys > 0,
        has_all_keys=num_queries > 0,
    )


def _new(shape: tuple[int, ...] | torch.Size, is_written_whole: bool) -> Tensor:
    return torch.empty(shape) if is_written_whole else torch.zeros(shape)


def _with_joined_features(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _array(x: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = x.detach().numpy()
    return array


def _maybe_array(x: Tensor | None) -> NDArray[np.float32] | None:
    return None if x is None else _array(x)
