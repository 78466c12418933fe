"""Ops in PyTorch: the readable reference, and the path that runs on CPU and CUDA.

Shapes: B batch, T query tokens, S key tokens, N query heads, K key-value heads, H head_dim, D features, V vocab_size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from openbook.ops.base import AttentionMask, Matrices
from openbook.ops.blocked import blocked_linear
from openbook.ops.document_attention import PackedRows, document_attention, packed_rows
from openbook.ops.eager_gradients import RMSNorm, Rope, SiLUMul, Take, rotate
from openbook.ops.grouped_linear import grouped_linear
from openbook.ops.wide_products import is_wide, wide_bmm, wide_linear


def visible_keys(mask: AttentionMask) -> Tensor:
    """The mask spelled out: bool [B, T, S], true where a query may see a key."""
    query_BT1 = mask.query_positions[:, :, None]
    key_B1S = mask.key_positions[:, None, :]
    visible_BTS = key_B1S <= query_BT1
    if mask.window is not None:
        visible_BTS = visible_BTS & (query_BT1 - key_B1S < mask.window)
    if mask.query_documents is not None and mask.key_documents is not None:
        key_documents_B1S = mask.key_documents[:, None, :]
        visible_BTS = visible_BTS & (mask.query_documents[:, :, None] == key_documents_B1S) & (key_documents_B1S >= 0)
    return visible_BTS


class TorchOps:
    """The arithmetic through torch.nn.functional; holds no state, so one instance serves any number of models."""

    name = "torch"
    is_exact = False

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Ops.linear`; the weight may be blocked."""
        if weight.layout == torch.strided:
            return wide_linear(x, weight, bias) if is_wide(x) else F.linear(x, weight, bias)
        return blocked_linear(x, weight, bias)

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        """See `Ops.embedding`."""
        return F.embedding(ids, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        if _is_eager_training(x) and x.dtype == weight.dtype:
            normed: Tensor = RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
            return normed
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """See `Ops.layer_norm`."""
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)

    def rope_tables(self, positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """See `Ops.rope_tables`."""
        angles = positions[..., None].float() * frequencies
        return angles.cos(), angles.sin()

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `Ops.rope`."""
        if _is_eager_training(x):
            rotated: Tensor = Rope.apply(x, cos, sin)  # type: ignore[no-untyped-call]
            return rotated
        return rotate(x, cos, sin)

    def prepare_mask(self, mask: AttentionMask, dtype: torch.dtype) -> AttentionMask:
        """See `Ops.prepare_mask`; `prepared` is what is added to the scores, or where packed documents begin."""
        if mask.is_plain_causal and mask.window is None:
            return mask
        if mask.query_positions.device.type == "cpu" and (rows := packed_rows(mask)) is not None:
            return replace(mask, prepared=rows)
        return replace(mask, prepared=_bias(mask, dtype))

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        """See `Ops.attention`."""
        if mask is None:
            assert sinks is None
            return _attend_to_all(q, k, v, scale)
        if mask.prepared is None:
            mask = self.prepare_mask(mask, q.dtype)
        bias = mask.prepared
        if k.shape[2] == 1 and v.shape[-1] < k.shape[-1] and sinks is None:
            # A latent: no fused kernel takes it without a copy for each head.
            bias = _bias(mask, q.dtype) if bias is None or isinstance(bias, PackedRows) else bias
            return latent_attention(q, k, v, bias, scale)
        if isinstance(bias, PackedRows):
            if sinks is None and q.shape[-1] == v.shape[-1]:
                return document_attention(q, k, v, bias, scale)
            bias = _bias(mask, q.dtype)
        if sinks is not None and bias is None:
            bias = _bias(mask, q.dtype)
        if sinks is not None or _is_decoding(q):
            return grouped_attention(q, k, v, bias, scale, sinks)
        out_BNTH = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=bias,
            is_causal=bias is None,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out_BNTH.transpose(1, 2)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Ops.silu_mul`."""
        if _is_eager_training(gate_up):
            out: Tensor = SiLUMul.apply(gate_up)  # type: ignore[no-untyped-call]
            return out
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def clamped_swiglu(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        """See `Ops.clamped_swiglu`."""
        gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))

    def gelu_tanh(self, x: Tensor) -> Tensor:
        """See `Ops.gelu_tanh`."""
        return F.gelu(x, approximate="tanh")

    def gelu(self, x: Tensor) -> Tensor:
        """See `Ops.gelu`."""
        return F.gelu(x)

    def gelu_sigmoid(self, x: Tensor) -> Tensor:
        """See `Ops.gelu_sigmoid`."""
        return x * torch.sigmoid(1.702 * x)

    def sigmoid(self, x: Tensor) -> Tensor:
        """See `Ops.sigmoid`."""
        return x.sigmoid()

    def softmax(self, x: Tensor) -> Tensor:
        """See `Ops.softmax`."""
        return x.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `Ops.top_k`."""
        values, places = x.topk(k, dim=-1)
        return values, places

    def grouped_linear(self, x: Tensor, weight: Matrices, ends: Tensor) -> Tensor:
        """See `Ops.grouped_linear`."""
        return grouped_linear(x, weight, ends)

    def head_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `Ops.head_linear`."""
        B, T, N, _ = x.shape
        out_NrO = wide_bmm(x.permute(2, 0, 1, 3).reshape(N, B * T, -1), weight.mT)
        return out_NrO.view(N, B, T, -1).permute(1, 2, 0, 3)

    def keep_groups(self, x: Tensor, scores: Tensor, k: int, hidden: float) -> Tensor:
        """See `Ops.keep_groups`."""
        # Unsorted as in the routers of Transformers: sorting may choose others among equals.
        chosen = scores.topk(k, dim=-1, sorted=False).indices
        is_kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
        num_neighbours = x.shape[-1] // scores.shape[-1]
        return x.masked_fill(~is_kept.repeat_interleave(num_neighbours, dim=-1), hidden)

    def weighted_sum(self, x: Tensor, weights: Tensor) -> Tensor:
        """See `Ops.weighted_sum`."""
        return (weights[:, None, :] @ x).squeeze(1)

    def shares(self, x: Tensor, tiny: float = 0.0) -> Tensor:
        """See `Ops.shares`."""
        sums = x.sum(-1, keepdim=True)
        return x / (sums + tiny if tiny else sums)

    def scale_rows(self, x: Tensor, factors: Tensor) -> Tensor:
        """See `Ops.scale_rows`."""
        return factors * x

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        """See `Ops.take`."""
        if _is_eager_training(x):
            taken: Tensor = Take.apply(x, rows)  # type: ignore[no-untyped-call]
            return taken
        return x.index_select(0, rows)

    def softmax_cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See `Ops.softmax_cross_entropy`."""
        return F.cross_entropy(logits.float(), targets.clamp_min(-1), ignore_index=-1, reduction="sum")

    def linear_cross_entropy(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """See `Ops.linear_cross_entropy`."""
        return self.softmax_cross_entropy(self.linear(x, weight), targets)


def _attend_to_all(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out_BNTH = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale, enable_gqa=q.shape[2] != k.shape[2]
    )
    return out_BNTH.transpose(1, 2)


def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """Attention as two products around a softmax; the query heads of a group share one product with their keys.

    q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv], bias [B, 1, T, S] or None: [B, T, N, Hv].
    sinks [N]: one more score a head (gpt-oss model card, arXiv 2508.10925, section 2.2).
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    q_BKrH = (q * scale).view(B, T, K, N // K, H).permute(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    scores_BNTS = (q_BKrH @ k.permute(0, 2, 3, 1)).view(B, N, T, S)
    if bias is not None:
        scores_BNTS = scores_BNTS + bias
    if sinks is not None:
        sinks_BNT1 = sinks.to(q.dtype).view(1, N, 1, 1).expand(B, N, T, 1)
        weights_BNTS = torch.cat([scores_BNTS, sinks_BNT1], -1).softmax(-1)[..., :-1]
    else:
        weights_BNTS = scores_BNTS.softmax(-1)
    out_BNTH = (weights_BNTS.reshape(B, K, -1, S) @ v.transpose(1, 2)).view(B, N, T, -1)
    return out_BNTH.transpose(1, 2)


def latent_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention of many query heads over one key head, which is copied for none of them.

    q [B, T, N, H], k [B, S, 1, H], v [B, S, 1, Hv], bias [B, 1, T, S]: [B, T, N, Hv].
    """
    B, T, N, H = q.shape
    q_BrH = (q * scale).reshape(B, T * N, H)
    # Keys times queries: the other way round, bfloat16 on a CPU takes 3 to 10 times as long.
    scores_BTNS = wide_bmm(k.squeeze(2), q_BrH.mT).mT.view(B, T, N, -1)
    weights_BTNS = (scores_BTNS + bias.transpose(1, 2)).softmax(-1)
    return wide_bmm(weights_BTNS.reshape(B, T * N, -1), v.squeeze(2)).view(B, T, N, -1)


def _is_decoding(q: Tensor) -> bool:
    """Whether this is a step of one token: the fused kernel is made for many."""
    return q.shape[1] == 1 and q.device.type == "cpu" and not torch.is_grad_enabled()


def _bias(mask: AttentionMask, dtype: torch.dtype) -> Tensor:
    """What hides keys when it is added to the scores, [B, 1, T, S].

    A finite number, not minus infinity: a query that sees no key (padding) gets a mean, not NaN.
    """
    return torch.where(visible_keys(mask), 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def _is_eager_training(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
