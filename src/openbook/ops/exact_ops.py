"""Ops of the exact profile: float32 on the CPU through the native core, the same bits on every CPU, with any number of
threads and in any batch.

Shapes: B batch, T query tokens, S key tokens, N query heads, K key-value heads, H head_dim, D features, V vocab_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openbook.core.errors import UserError
from openbook.ops.base import AttentionMask, Matrices
from openbook.ops.eager_gradients import Take
from openbook.ops.native_module import require_native

try:
    require_native()
except UserError:  # `ExactOps` says it to whoever makes one
    pass
else:
    from openbook.ops import exact_attention, exact_elementwise, exact_linear, exact_moe
    from openbook.ops.exact_quant import QuantMatrix
    from openbook.ops.exact_quant_linear import exact_quant_embedding, exact_quant_linear

# Tables are kept up to this position; those beyond are computed each time.
_MOST_KEPT = 1 << 16


class ExactOps:
    """The arithmetic of the exact profile. Tensors are float32 on the CPU.

    Raises:
        UserError: the native core is missing or does not run on this CPU; from a method: another dtype or device.
    """

    name = "exact"
    is_exact = True

    def __init__(self) -> None:
        require_native()
        # Frequencies to cos and sin of positions 0, 1, 2, ...
        self._tables: dict[tuple[float, ...], tuple[Tensor, Tensor]] = {}

    def linear(self, x: Tensor, weight: Tensor | QuantMatrix, bias: Tensor | None = None) -> Tensor:
        """See `Ops.linear`; the weight may be quantised, without gradients then."""
        if isinstance(weight, QuantMatrix):
            return exact_quant_linear(x, weight, bias)
        return exact_linear.exact_linear(x, weight, bias)

    def embedding(self, ids: Tensor, weight: Tensor | QuantMatrix) -> Tensor:
        """See `Ops.embedding`; the weight may be quantised."""
        if isinstance(weight, QuantMatrix):
            return exact_quant_embedding(ids, weight)
        return exact_linear.exact_embedding(ids, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        return exact_elementwise.exact_rms_norm(x, weight, eps)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """See `Ops.layer_norm`."""
        return exact_elementwise.exact_layer_norm(x, weight, bias, eps)

    def rope_tables(self, positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """See `Ops.rope_tables`; the product is rounded to float32, cos and sin of it nearly always correctly."""
        first, last = (int(edge) for edge in positions.aminmax()) if positions.numel() else (0, 0)
        if first < 0 or last >= _MOST_KEPT:
            return exact_elementwise.exact_rope_tables(positions, frequencies)
        key = tuple(frequencies.tolist())
        kept = self._tables.get(key)
        if kept is None or len(kept[0]) <= last:
            size = 1 << max(last, 255).bit_length()
            kept = exact_elementwise.exact_rope_tables(torch.arange(size), frequencies)
            self._tables[key] = kept
        cos, sin = kept
        return cos[positions], sin[positions]

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `Ops.rope`."""
        return exact_elementwise.exact_rope(x, cos, sin)

    def prepare_mask(self, mask: AttentionMask, dtype: torch.dtype) -> AttentionMask:
        """See `Ops.prepare_mask`."""
        return exact_attention.prepare_exact_mask(mask)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        """See `Ops.attention`."""
        return exact_attention.exact_attention(q, k, v, mask, scale, sinks)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Ops.silu_mul`."""
        return exact_elementwise.exact_silu_mul(gate_up)

    def clamped_swiglu(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        """See `Ops.clamped_swiglu`."""
        return exact_elementwise.exact_clamped_swiglu(gate_up, alpha, limit)

    def gelu_tanh(self, x: Tensor) -> Tensor:
        """See `Ops.gelu_tanh`."""
        return exact_elementwise.exact_gelu_tanh(x)

    def gelu(self, x: Tensor) -> Tensor:
        """See `Ops.gelu`."""
        return exact_elementwise.exact_gelu(x)

    def gelu_sigmoid(self, x: Tensor) -> Tensor:
        """See `Ops.gelu_sigmoid`."""
        return exact_elementwise.exact_gelu_sigmoid(x)

    def sigmoid(self, x: Tensor) -> Tensor:
        """See `Ops.sigmoid`."""
        return exact_elementwise.exact_sigmoid(x)

    def softmax(self, x: Tensor) -> Tensor:
        """See `Ops.softmax`."""
        return exact_elementwise.exact_softmax(x)

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `Ops.top_k`; of equal values the first comes first."""
        values, places = x.sort(dim=-1, descending=True, stable=True)
        return values[..., :k], places[..., :k]

    def grouped_linear(self, x: Tensor, weight: Matrices, ends: Tensor) -> Tensor:
        """See `Ops.grouped_linear`."""
        return exact_moe.exact_grouped_linear(x, weight, ends)

    def head_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `Ops.head_linear`."""
        B, T, N, _ = x.shape
        out_NrO = exact_moe.exact_products(x.permute(2, 0, 1, 3).flatten(1, 2), weight.mT)
        return out_NrO.view(N, B, T, -1).permute(1, 2, 0, 3)

    def keep_groups(self, x: Tensor, scores: Tensor, k: int, hidden: float) -> Tensor:
        """See `Ops.keep_groups`."""
        _, chosen = self.top_k(scores, k)
        is_kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
        return x.masked_fill(~is_kept.repeat_interleave(x.shape[-1] // scores.shape[-1], dim=-1), hidden)

    def weighted_sum(self, x: Tensor, weights: Tensor) -> Tensor:
        """See `Ops.weighted_sum`; over k in its order."""
        return exact_moe.exact_products(weights[:, None, :], x).squeeze(1)

    def shares(self, x: Tensor, tiny: float = 0.0) -> Tensor:
        """See `Ops.shares`; sums over k in its order, of which the reciprocal is multiplied in."""
        sums = exact_linear.exact_linear(x, torch.ones(1, x.shape[-1]))
        return self.scale_rows(x, 1.0 / (sums + tiny))

    def scale_rows(self, x: Tensor, factors: Tensor) -> Tensor:
        """See `Ops.scale_rows`."""
        return self.weighted_sum(x[:, None], factors)

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        """See `Ops.take`."""
        taken: Tensor = Take.apply(x, rows)  # type: ignore[no-untyped-call]
        return taken

    def softmax_cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See `Ops.softmax_cross_entropy`."""
        return exact_elementwise.exact_softmax_cross_entropy(logits, targets)

    def linear_cross_entropy(self, x: Tensor, weight: Tensor | QuantMatrix, targets: Tensor) -> Tensor:
        """See `Ops.linear_cross_entropy`; holds the logits of a few rows at a time. The weight may be quantised."""
        if isinstance(weight, QuantMatrix):
            return self.softmax_cross_entropy(exact_quant_linear(x, weight), targets)
        return exact_elementwise.exact_linear_cross_entropy(x, weight, targets)
