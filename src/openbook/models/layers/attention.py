"""Grouped-query attention with normalised queries and keys, as in Qwen 3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openbook.models.config import ModelConfig
from openbook.models.context import AttentionContext
from openbook.models.layers.linear import Linear
from openbook.models.layers.norm import RMSNorm
from openbook.ops.base import Ops

# B batch, T tokens, N query heads, K key-value heads, H head_dim, D hidden_size


class Attention(nn.Module):
    """Self-attention; q, k and v come from one matrix, their rows in that order (one GEMM in place of three)."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int) -> None:
        super().__init__()
        self.ops = ops
        self.layer = layer
        self.head_dim = config.head_dim
        self.splits = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        self.qkv_proj = Linear(config.hidden_size, sum(self.splits) * config.head_dim, ops)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size, ops)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops)

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], context: AttentionContext, wanted: Tensor | None = None
    ) -> Tensor:
        """x [B, T, D], rope tables [B, T, H/2] to [B, T, D], or [M, D] at `wanted` [M] of the flattened tokens."""
        B, T, _ = x_BTD.shape
        qkv = self.qkv_proj(x_BTD).view(B, T, -1, self.head_dim)
        q_BTNH, k_BTKH, v_BTKH = torch.split(qkv, self.splits, dim=2)
        q_BTNH = self.ops.rope(self.q_norm(q_BTNH), *rope)
        k_BTKH = self.ops.rope(self.k_norm(k_BTKH), *rope)
        out_BTNH = context.attend(self.ops, self.layer, q_BTNH, k_BTKH, v_BTKH, self.head_dim**-0.5)
        out_BTD = out_BTNH.reshape(B, T, -1)
        out: Tensor = self.o_proj(out_BTD if wanted is None else self.ops.take(out_BTD.flatten(0, 1), wanted))
        return out
