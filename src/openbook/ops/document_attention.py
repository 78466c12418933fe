"""Attention inside documents, for training on packed rows on a CPU.

A row of T tokens with documents of L tokens has T * T scores, of which T * L matter. So the tokens are copied out into
groups of documents of like length, a group is a batch of plain causal attention, and the results are copied back.
Lengths are rounded up; what fills a document up lies behind its tokens, where the causal order hides it.

The gradient is written out: it copies with the two indices exchanged, where autograd would add into zeros. Both are
operators of their own to the compiler, as what they compute depends on where the documents of a batch begin.

Shapes: M = B * T tokens, N query heads, K key-value heads, G = N / K heads a group, H head_dim, n documents of a group,
L their rounded length, S slots: the sum of all rounded lengths.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openbook.ops.base import AttentionMask
from openbook.ops.wide_products import wide_bmm

# Lengths are rounded up to a multiple of this: fewer groups against fewer useless scores.
_LENGTH_STEP = 32


class PackedRows(NamedTuple):
    """Whole rows of documents, each in one piece with positions from 0: what this attention needs of a mask.

    starts: int8 [B, T], 1 where a document (or a stretch of padding) begins, 0 inside, negative where the row is not
        as said. window: number of latest tokens that a query sees, itself included; 0 for all.
    """

    starts: Tensor
    window: int


class Rows(NamedTuple):
    """How rows (token, head), heads innermost, map to rows (document, head, slot), all groups one after another.

    source: int64, the first kind's number for each of the second. target: the reverse. unused: the rows of the second
    kind that hold no token; their source is 0.
    """

    source: Tensor
    target: Tensor
    unused: Tensor


class DocumentGroups:
    """Where the tokens of packed rows go.

    Args:
        starts: bool [B, T], where documents begin.
        window: number of latest tokens that a query sees, itself included; 0 for all.
        dtype: of queries, keys and values.
    """

    def __init__(self, starts: Tensor, window: int, dtype: torch.dtype) -> None:
        first = starts.flatten().nonzero().squeeze(1)
        num_tokens = starts.numel()
        lengths = torch.diff(first, append=first.new_tensor([num_tokens]))
        rounded = (lengths + _LENGTH_STEP - 1) // _LENGTH_STEP * _LENGTH_STEP
        order = rounded.argsort(stable=True)
        base = torch.empty_like(rounded)
        base[order] = rounded[order].cumsum(0) - rounded[order]
        # Of each token: the first slot of its document, the document's rounded length, its place in the document.
        self._base, self._rounded, begin = (x.repeat_interleave(lengths) for x in (base, rounded, first))
        self._place = torch.arange(num_tokens) - begin
        self._rows: dict[int, Rows] = {}
        self.num_slots = int(rounded.sum())
        sizes, counts = torch.unique(rounded, return_counts=True)
        self.shapes = list(zip(counts.tolist(), sizes.tolist(), strict=True))
        self.num_scores = sum(n * L * L for n, L in self.shapes)
        self.biases = [_causal_bias(size, window, dtype) for _, size in self.shapes]

    def rows(self, num_heads: int) -> Rows:
        """The map for tensors of `num_heads` heads."""
        if num_heads not in self._rows:
            heads = torch.arange(num_heads)
            target = (self._base * num_heads + self._place)[:, None] + self._rounded[:, None] * heads
            target = target.flatten()
            source = torch.zeros(self.num_slots * num_heads, dtype=torch.int64)
            source[target] = torch.arange(len(target))
            unused = torch.ones(self.num_slots * num_heads, dtype=torch.bool)
            unused[target] = False
            self._rows[num_heads] = Rows(source, target, unused.nonzero().squeeze(1))
        return self._rows[num_heads]


def packed_rows(mask: AttentionMask) -> PackedRows | None:
    """What `document_attention` needs of `mask`; None if the mask is not of whole packed rows.

    That is: documents lie in one piece, their positions count from 0, and keys are those of the queries. In a compiled
    step the first two show only when it runs: `document_attention` then raises.
    """
    documents, positions = mask.query_documents, mask.query_positions
    if documents is None or mask.key_documents is not documents or mask.key_positions is not positions:
        return None
    is_start = torch.cat([torch.ones_like(documents[:, :1]), documents[:, 1:] != documents[:, :-1]], dim=1).bool()
    columns = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begin = torch.where(is_start, columns, 0).cummax(1).values
    is_odd = (positions != columns - begin) & (documents >= 0)
    if not torch.compiler.is_compiling() and bool(is_odd.any()):
        return None
    return PackedRows(torch.where(is_odd, -1, is_start.to(torch.int8)), mask.window or 0)


def document_attention(q: Tensor, k: Tensor, v: Tensor, rows: PackedRows, scale: float) -> Tensor:
    """q [B, T, N, H], k and v [B, T, K, H] to [B, T, N, H]; stretches of padding count as documents.

    Raises:
        ValueError: the rows are not whole packed rows.
    """
    out: Tensor = _attend(q * scale, k, v, *rows)[0]
    return out


@torch.library.custom_op("openbook::document_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result, and for the gradient: q, k, v by slot, [S * heads, H], and all softmax weights, flat."""
    groups = _groups(starts, window, q.dtype)
    N, K, H = q.shape[2], k.shape[2], q.shape[3]
    query_rows, key_rows = groups.rows(N), groups.rows(K)
    queries = q.reshape(-1, H).index_select(0, query_rows.source)
    keys, values = (x.reshape(-1, H).index_select(0, key_rows.source) for x in (k, v))
    out = torch.empty_like(queries)
    weights = queries.new_empty(N * groups.num_scores)
    for (n, L), bias, weight, q_g, k_g, v_g, out_g in zip(
        groups.shapes, groups.biases, *_split(groups, K, weights, queries, keys, values, out), strict=True
    ):
        scores = wide_bmm(q_g, k_g.mT)
        scores.view(n, N, L, L).add_(bias)
        torch.softmax(scores, -1, out=weight)
        wide_bmm(weight, v_g, out=out_g)
    return out.index_select(0, query_rows.target).view(q.shape), queries, keys, values, weights


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    N, K, H = q.shape[2], k.shape[2], q.shape[3]
    context = torch.library.get_ctx()
    num_slots, num_scores = context.new_dynamic_size(), context.new_dynamic_size()
    by_slot = [q.new_empty(num_slots * heads, H) for heads in (N, K, K)]
    return q.new_empty(q.shape), by_slot[0], by_slot[1], by_slot[2], q.new_empty(num_scores)


@torch.library.custom_op("openbook::document_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    num_kv_heads: int,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Tensor,
    starts: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = _groups(starts, window, grad.dtype)
    (B, T, N, H), K = grad.shape, num_kv_heads
    query_rows, key_rows = groups.rows(N), groups.rows(K)
    # A query that is no token sees tokens: its gradient must be zero for theirs to be right.
    dout = grad.reshape(-1, H).index_select(0, query_rows.source).index_fill_(0, query_rows.unused, 0.0)
    dqueries, dkeys, dvalues = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
    for weight, q_g, k_g, v_g, dout_g, dq_g, dk_g, dv_g in zip(
        *_split(groups, K, weights, queries, keys, values, dout, dqueries, dkeys, dvalues), strict=True
    ):
        wide_bmm(weight.mT, dout_g, out=dv_g)
        dweight = wide_bmm(dout_g, v_g.mT)
        dscores = torch._softmax_backward_data(dweight, weight, -1, weight.dtype)
        wide_bmm(dscores, k_g, out=dq_g)
        wide_bmm(dscores.mT, q_g, out=dk_g)
    dq = dqueries.index_select(0, query_rows.target).view(B, T, N, H)
    dk, dv = (x.index_select(0, key_rows.target).view(B, T, K, H) for x in (dkeys, dvalues))
    return dq, dk, dv


@_attend_backward.register_fake
def _(grad: Tensor, num_kv_heads: int, *_others: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, T, _, H = grad.shape
    dk, dv = (grad.new_empty(B, T, num_kv_heads, H) for _ in range(2))
    return grad.new_empty(grad.shape), dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, k, _, starts, window = inputs
    ctx.save_for_backward(*output[1:], starts)
    ctx.num_kv_heads, ctx.window = k.shape[2], window


def _gradient(ctx: Any, grad: Tensor, *_unused: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
    return *_attend_backward(grad, ctx.num_kv_heads, *ctx.saved_tensors, ctx.window), None, None


_attend.register_autograd(_gradient, setup_context=_save)


def _groups(starts: Tensor, window: int, dtype: torch.dtype) -> DocumentGroups:
    """The groups of this batch, made once for all its layers and both directions."""
    return _cached_groups(starts.numpy().tobytes(), starts.shape, window, dtype)


@functools.lru_cache(maxsize=8)
def _cached_groups(starts: bytes, shape: tuple[int, int], window: int, dtype: torch.dtype) -> DocumentGroups:
    starts_BT = torch.frombuffer(bytearray(starts), dtype=torch.int8).view(shape)
    if bool((starts_BT < 0).any()):
        raise ValueError("a document lies in several pieces or its positions do not count from 0: pack rows so")
    return DocumentGroups(starts_BT.bool(), window, dtype)


def _split(groups: DocumentGroups, num_kv_heads: int, weights: Tensor, *tensors: Tensor) -> list[list[Tensor]]:
    """Weights as one view [n * K, G * L, L] a group, then each tensor [rows, H] as one [n * K, G * L or L, H]."""
    N = len(weights) // groups.num_scores
    parts = torch.split(weights, [N * n * L * L for n, L in groups.shapes])
    views = [[part.view(n * num_kv_heads, -1, L) for part, (n, L) in zip(parts, groups.shapes, strict=True)]]
    for x in tensors:
        num_heads = len(x) // groups.num_slots
        parts = torch.split(x, [n * L * num_heads for n, L in groups.shapes])
        views.append(
            [part.view(n * num_kv_heads, -1, x.shape[1]) for part, (n, _) in zip(parts, groups.shapes, strict=True)]
        )
    return views


def _causal_bias(size: int, window: int, dtype: torch.dtype) -> Tensor:
    """[L, L], 0 where a query sees a key, else minus infinity."""
    hidden = torch.ones(size, size, dtype=torch.bool).triu_(1)
    if window:
        hidden |= torch.ones(size, size, dtype=torch.bool).tril_(-window)
    return torch.zeros(size, size, dtype=dtype).masked_fill_(hidden, -torch.inf)
