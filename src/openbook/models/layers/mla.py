"""Multi-head latent attention (DeepSeek V2, arXiv 2405.04434, section 2.1): the cache holds one latent a token.

A head's key is a part made from the latent and a rotated part that all heads share; its value is made from the latent
too. Two forms give the same result. For many tokens latents are expanded to keys and values. For few, as in decoding,
the matrix that makes keys is applied to the query instead, and the one that makes values to the result: then the
latents themselves are keys and values of one head, and nothing is expanded (section 2.1.2, "absorbed").

Rotary embedding turns pairs of neighbours (2i, 2i + 1) here, the interleaved convention. `Ops.rope` pairs halves, so
neighbours are put apart first; scores do not depend on the order of features.

Shapes: B batch, T tokens, S tokens in the cache, N heads, R kv_lora_rank, P qk_rope_head_dim, C qk_nope_head_dim,
V v_head_dim, D hidden_size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openbook.models.configs.deepseek import LatentConfig
from openbook.models.context import AttentionContext
from openbook.models.layers.linear import Linear
from openbook.models.layers.norm import RMSNorm
from openbook.models.layers.rope import yarn_mscale
from openbook.ops.base import Ops

# Of the latents, whatever the configuration says for the stream: as in the authors' code and in Transformers.
_LATENT_EPS = 1e-6


class LatentAttention(nn.Module):
    """Self-attention over latents."""

    def __init__(self, config: LatentConfig, ops: Ops, layer: int) -> None:
        super().__init__()
        self.ops = ops
        self.layer = layer
        self.is_interleaved = config.rope_interleave
        self.num_heads = config.num_attention_heads
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value_dim, self.latent_dim = config.v_head_dim, config.kv_lora_rank
        key_dim = self.nope_dim + self.rope_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, self.num_heads * key_dim, ops)
        else:
            self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank, ops)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, _LATENT_EPS, ops)
            self.q_b_proj = Linear(config.q_lora_rank, self.num_heads * key_dim, ops)
        self.has_query_latent = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, self.latent_dim + self.rope_dim, ops)
        self.kv_a_layernorm = RMSNorm(self.latent_dim, _LATENT_EPS, ops)
        self.kv_b_proj = Linear(self.latent_dim, self.num_heads * (self.nope_dim + self.value_dim), ops)
        # Its rows: the keys of all heads, then the values of all heads. These two are read one by one, as they lie.
        self.kv_b_proj.is_only_multiplied = False
        self._expanded_rows = [self.num_heads * self.nope_dim, self.num_heads * self.value_dim]
        self.o_proj = Linear(self.num_heads * self.value_dim, config.hidden_size, ops)
        scaling = config.rope_scaling
        mscale = yarn_mscale(scaling.factor, scaling.mscale_all_dim) if scaling and scaling.mscale_all_dim else 1.0
        self.scale = key_dim**-0.5 * mscale**2
        # Absorbed, a query takes 2 R + P products with each token of the cache in place of C + P + V; expanded, each
        # token of the cache takes R (C + V) once.
        # The two forms round differently: where bits count there is but one, however many tokens come at a time.
        self.most_absorbed = 0 if ops.is_exact else max(1, (self.nope_dim + self.value_dim) // 4)

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], context: AttentionContext, wanted: Tensor | None = None
    ) -> Tensor:
        """x [B, T, D], rope tables [B, T, P/2] to [B, T, D], or [M, D] at `wanted` [M] of the flattened tokens."""
        B, T, _ = x_BTD.shape
        q_BTNC, q_BTNP = torch.split(
            self._queries(x_BTD).view(B, T, self.num_heads, -1), [self.nope_dim, self.rope_dim], -1
        )
        latent_BTR, k_BTP = torch.split(self.kv_a_proj_with_mqa(x_BTD), [self.latent_dim, self.rope_dim], -1)
        q_BTNP = self._rotate(q_BTNP, rope)
        kept = torch.cat([self.kv_a_layernorm(latent_BTR)[:, :, None], self._rotate(k_BTP[:, :, None], rope)], -1)
        attend = self._attend_absorbed if self.most_absorbed >= T else self._attend_expanded
        out_BTD = attend(q_BTNC, q_BTNP, kept, context).reshape(B, T, -1)
        out: Tensor = self.o_proj(out_BTD if wanted is None else self.ops.take(out_BTD.flatten(0, 1), wanted))
        return out

    def _queries(self, x_BTD: Tensor) -> Tensor:
        queries: Tensor = (
            self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD))) if self.has_query_latent else self.q_proj(x_BTD)
        )
        return queries

    def _rotate(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        if self.is_interleaved:
            x = x.reshape(*x.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2)
        return self.ops.rope(x, *rope)

    def _attend_expanded(self, q_BTNC: Tensor, q_BTNP: Tensor, kept: Tensor, context: AttentionContext) -> Tensor:
        q = torch.cat([q_BTNC, q_BTNP], -1)
        return context.attend(self.ops, self.layer, q, kept, None, self.scale, expand=self._expand)

    def _expand(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """What the cache keeps, [B, S, 1, R + P], to keys [B, S, N, C + P] and values [B, S, N, V]."""
        latent, shared = torch.split(kept, [self.latent_dim, self.rope_dim], -1)
        expanded = torch.split(self.kv_b_proj(latent.squeeze(2)), self._expanded_rows, -1)
        k, v = (part.view(*part.shape[:2], self.num_heads, -1) for part in expanded)
        return torch.cat([k, shared.expand(-1, -1, self.num_heads, -1)], -1), v

    def _attend_absorbed(self, q_BTNC: Tensor, q_BTNP: Tensor, kept: Tensor, context: AttentionContext) -> Tensor:
        halves = torch.split(self.kv_b_proj.weight, self._expanded_rows)
        to_k_NCR, to_v_NVR = (half.view(self.num_heads, -1, self.latent_dim) for half in halves)
        q = torch.cat([self.ops.head_linear(q_BTNC, to_k_NCR.mT), q_BTNP], -1)
        mixed_BTNR = context.attend(self.ops, self.layer, q, kept, None, self.scale, expand=self._as_one_head)
        return self.ops.head_linear(mixed_BTNR, to_v_NVR)

    def _as_one_head(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        return kept, kept[..., : self.latent_dim]
