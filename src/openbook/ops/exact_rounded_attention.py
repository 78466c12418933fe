"""Attention with keys and values of 8 bits in the exact profile, slowly: the specification in native/quant_attention.h
step by step, which the native core must agree with to the bit.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H features of a head; of one document P
positions, filled up to whole blocks of 32, and Q queries.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openbook.ops import _native
from openbook.ops.base import AttentionMask
from openbook.ops.exact_attention import AttentionPlan, prepare_exact_mask
from openbook.ops.exact_ops import ExactOps

Floats = NDArray[np.float32]

BLOCK = 32
LANES = 16
_MOST = np.float32(127)


class RoundedCacheOps(ExactOps):
    """`ExactOps` whose attention rounds keys, values and what is multiplied by them to 8 bits; for inference."""

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        """See `Ops.attention`; without gradients. H is a multiple of 32, and the mask says where keys stand."""
        assert mask is not None and q.shape[-1] % BLOCK == 0 and not q.requires_grad
        plan: AttentionPlan = prepare_exact_mask(mask).prepared
        out = torch.zeros_like(q)
        sink = None if sinks is None else sinks.numpy()
        for row, _, key_begin, key_end, query_begin, query_end in plan.segments.tolist():
            keys, queries = plan.keys[key_begin:key_end], plan.queries[query_begin:query_end]
            first = int(mask.key_positions[row, int(keys[0])]) % BLOCK  # where it stands in its block
            size = -(-(first + len(keys)) // BLOCK) * BLOCK
            numbers = np.arange(size) - first
            begins, ends = (x[query_begin:query_end, None] for x in (plan.visible_begin, plan.visible_end))
            is_visible_QP = (begins <= numbers) & (numbers < ends)
            pads = ((first, size - first - len(keys)), (0, 0), (0, 0))
            k_PKH, v_PKH = (np.pad(x[row, keys].numpy(), pads) for x in (k, v))
            out[row, queries] = torch.from_numpy(
                rounded_attention(q[row, queries].numpy(), k_PKH, v_PKH, is_visible_QP, scale, sink)
            )
        return out


def rounded_attention(
    q_QNH: Floats, k_PKH: Floats, v_PKH: Floats, is_visible_QP: NDArray[np.bool_], scale: float, sinks_N: Floats | None
) -> Floats:
    """The result [Q, N, H] of one document, float32 throughout.

    Args:
        k_PKH, v_PKH: by position; the first stands at the begin of a block.
        is_visible_QP: which positions a query sees, a range of them.
        scale: factor on the scores, rounded to float32.
        sinks_N: one more score for each head, or None.
    """
    out_QNH = np.empty_like(q_QNH)
    group = q_QNH.shape[1] // k_PKH.shape[1]
    with np.errstate(all="ignore"):
        for head in range(q_QNH.shape[1]):
            k_PH, v_PH = k_PKH[:, head // group], v_PKH[:, head // group]
            scores_QP = _products(*_rounded(q_QNH[:, head]), *_rounded(k_PH)) * np.float32(scale)
            largest_Q1 = np.fmax.reduce(np.where(is_visible_QP, scores_QP, np.float32("-inf")), axis=1, keepdims=True)
            if sinks_N is not None:
                largest_Q1 = np.fmax(largest_Q1, sinks_N[head])
            e_QP = np.where(is_visible_QP, _exp(scores_QP - largest_Q1), np.float32(0))
            denominators_Q = _lane_sums(e_QP)
            if sinks_N is not None:
                denominators_Q = denominators_Q + _exp(sinks_N[head] - largest_Q1)[:, 0]
            codes_PH, scales_P = _rounded_whole(v_PH)
            weights_QP = np.where(is_visible_QP, e_QP * scales_P, np.float32(0))
            codes_QP, scales_Qb = _rounded(weights_QP)
            # One more block of the sum for each 32 positions, whose factor is that of the weights alone.
            ones_Hb = np.ones((v_PH.shape[1], scales_Qb.shape[1]), np.float32)
            sums_QH = _products(codes_QP, scales_Qb, codes_PH.T, ones_Hb)
            is_any_Q = is_visible_QP.any(axis=1)
            inverses_Q = np.where(is_any_Q, np.float32(1) / denominators_Q, np.float32(0))
            out_QNH[:, head] = sums_QH * inverses_Q[:, None] + np.float32(0)
    return out_QNH


def _rounded(x: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Whole numbers [R, n] and scales [R, n / 32] of x [R, n], block by block."""
    blocks = x.reshape(len(x), -1, BLOCK)
    codes, scales = _rounded_whole(blocks)
    return codes.reshape(x.shape), scales


def _rounded_whole(x: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Whole numbers [..., n] and scales [...] of x [..., n], one scale for all n."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    is_finite = np.isfinite(largest)
    inverses = _MOST / largest
    inverses = np.where(np.isinf(inverses), np.float32(0), inverses)
    codes = np.where(is_finite, np.rint(x * inverses), 0).astype(np.int64)
    scales = np.where(is_finite, largest / _MOST, np.float32("nan"))[..., 0]
    return codes, scales


def _products(a: NDArray[np.int64], a_scales: Floats, b: NDArray[np.int64], b_scales: Floats) -> Floats:
    """Rows of a [R, n] times rows of b [C, n], block by block: [R, C]."""
    sums = np.zeros((len(a), len(b)), np.float32)
    for block in range(a_scales.shape[1]):
        part = slice(BLOCK * block, BLOCK * (block + 1))
        factors = b_scales[None, :, block] * a_scales[:, None, block]
        sums = fma((a[:, part] @ b[:, part].T).astype(np.float32), factors, sums)
    return sums


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c, rounded once: exactly in float64 and an error term, which decides between two neighbours.

    Rounding to odd first makes the second rounding right (Boldo and Melquiond, doi 10.1109/TC.2007.70819).
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)
    is_even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    is_moved = (error != 0) & is_even & np.isfinite(total)
    result: Floats = np.where(is_moved, odd, total).astype(np.float32)
    return result


def _exp(x: Floats) -> Floats:
    out = np.empty(x.size, np.float32)
    _native.exp(np.ascontiguousarray(x, np.float32).reshape(-1), out)
    return out.reshape(x.shape)


def _lane_sums(x_QP: Floats) -> Floats:
    """Sums of rows in 16 lanes by position, and those by halves."""
    lanes = np.zeros((len(x_QP), LANES), np.float32)
    for start in range(0, x_QP.shape[1], LANES):
        lanes = lanes + x_QP[:, start : start + LANES]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]
