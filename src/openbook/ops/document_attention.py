"""Attention inside documents, for eager passes over packed rows on a CPU.

A row of T tokens with documents of L tokens has T * T scores, of which T * L matter. So the tokens are copied out into
groups of documents of like length, a group is a batch of plain causal attention, and the results are copied back.
Lengths are rounded up; what fills a document up lies behind its tokens, where the causal order hides it.

The gradient is written out: it copies with the two indices exchanged, where autograd would add into zeros.

Shapes: M = B * T tokens, N query heads, K key-value heads, G = N / K heads a group, H head_dim, n documents of a group,
L their rounded length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from openbook.ops.base import AttentionMask

# Lengths are rounded up to a multiple of this: fewer groups against fewer useless scores.
_LENGTH_STEP = 32


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
        starts: bool [B, T], from `document_starts`.
        window: number of latest tokens that a query sees, itself included; None for all.
        dtype: of queries, keys and values.
    """

    def __init__(self, starts: Tensor, window: int | None, dtype: torch.dtype) -> None:
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
        self._num_slots = int(rounded.sum())
        self._rows: dict[int, Rows] = {}
        sizes, counts = torch.unique(rounded, return_counts=True)
        self.shapes = list(zip(counts.tolist(), sizes.tolist(), strict=True))
        self.biases = [_causal_bias(size, window, dtype) for _, size in self.shapes]

    def rows(self, num_heads: int) -> Rows:
        """The map for tensors of `num_heads` heads."""
        if num_heads not in self._rows:
            heads = torch.arange(num_heads)
            target = (self._base * num_heads + self._place)[:, None] + self._rounded[:, None] * heads
            target = target.flatten()
            source = torch.zeros(self._num_slots * num_heads, dtype=torch.int64)
            source[target] = torch.arange(len(target))
            unused = torch.ones(self._num_slots * num_heads, dtype=torch.bool)
            unused[target] = False
            self._rows[num_heads] = Rows(source, target, unused.nonzero().squeeze(1))
        return self._rows[num_heads]


def document_starts(mask: AttentionMask) -> Tensor | None:
    """Bool [B, T], where documents (and stretches of padding) begin; None if the mask is not of whole packed rows.

    That is: documents lie in one piece, their positions count from 0, and keys are those of the queries.
    """
    documents, positions = mask.query_documents, mask.query_positions
    if documents is None or mask.key_documents is not documents or mask.key_positions is not positions:
        return None
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    columns = torch.arange(documents.shape[1]).expand_as(documents)
    begin = torch.where(starts, columns, 0).cummax(1).values
    is_one_piece = ((positions == columns - begin) | (documents < 0)).all()
    return starts if bool(is_one_piece) else None


def document_attention(q: Tensor, k: Tensor, v: Tensor, groups: DocumentGroups, scale: float) -> Tensor:
    """q [B, T, N, H], k and v [B, T, K, H] to [B, T, N, H]; stretches of padding count as documents."""
    out: Tensor = _DocumentAttention.apply(q, k, v, groups, scale)  # type: ignore[no-untyped-call]
    return out


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: DocumentGroups, scale: float) -> Tensor:
        N, K, H = q.shape[2], k.shape[2], q.shape[3]
        query_rows, key_rows = groups.rows(N), groups.rows(K)
        queries = q.reshape(-1, H).index_select(0, query_rows.source).mul_(scale)
        keys, values = (x.reshape(-1, H).index_select(0, key_rows.source) for x in (k, v))
        out = torch.empty_like(queries)
        weights = []
        for (n, L), bias, q_g, k_g, v_g, out_g in zip(
            groups.shapes, groups.biases, *_split(groups, K, queries, keys, values, out), strict=True
        ):
            scores = torch.bmm(q_g, k_g.mT)
            scores.view(n, N, L, L).add_(bias)
            weight = scores.softmax(-1)
            torch.bmm(weight, v_g, out=out_g)
            weights.append(weight)
        ctx.save_for_backward(queries, keys, values, *weights)
        ctx.groups, ctx.scale = groups, scale
        return out.index_select(0, query_rows.target).view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        queries, keys, values, *weights = ctx.saved_tensors
        groups: DocumentGroups = ctx.groups
        B, T, N, H = grads[0].shape
        K = len(keys) * N // len(queries)
        query_rows, key_rows = groups.rows(N), groups.rows(K)
        # A query that is no token sees tokens: its gradient must be zero for theirs to be right.
        dout = grads[0].reshape(-1, H).index_select(0, query_rows.source).index_fill_(0, query_rows.unused, 0.0)
        dqueries, dkeys, dvalues = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
        for weight, q_g, k_g, v_g, dout_g, dq_g, dk_g, dv_g in zip(
            weights, *_split(groups, K, queries, keys, values, dout, dqueries, dkeys, dvalues), strict=True
        ):
            torch.bmm(weight.mT, dout_g, out=dv_g)
            dweight = torch.bmm(dout_g, v_g.mT)
            dscores = torch._softmax_backward_data(dweight, weight, -1, weight.dtype)
            torch.bmm(dscores, k_g, out=dq_g)
            torch.bmm(dscores.mT, q_g, out=dk_g)
        dq = dqueries.mul_(ctx.scale).index_select(0, query_rows.target).view(B, T, N, H)
        dk, dv = (x.index_select(0, key_rows.target).view(B, T, K, H) for x in (dkeys, dvalues))
        return dq, dk, dv, None, None


def _split(groups: DocumentGroups, num_kv_heads: int, *tensors: Tensor) -> list[list[Tensor]]:
    """Each tensor [rows, H] as one view [n * K, G * L or L, H] a group."""
    num_slots = sum(n * L for n, L in groups.shapes)
    views = []
    for x in tensors:
        num_heads = len(x) // num_slots
        parts = torch.split(x, [n * L * num_heads for n, L in groups.shapes])
        views.append(
            [part.view(n * num_kv_heads, -1, x.shape[1]) for part, (n, _) in zip(parts, groups.shapes, strict=True)]
        )
    return views


def _causal_bias(size: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[L, L], 0 where a query sees a key, else minus infinity."""
    hidden = torch.ones(size, size, dtype=torch.bool).triu_(1)
    if window is not None:
        hidden |= torch.ones(size, size, dtype=torch.bool).tril_(-window)
    return torch.zeros(size, size, dtype=dtype).masked_fill_(hidden, -torch.inf)
