"""Qwen 2 MoE (arXiv 2407.10671): Qwen 2 with experts, and beside them one for every token behind a sigmoid gate."""

from __future__ import annotations

from torch import nn

from openbook.models.configs.qwen_moe import Qwen2MoeConfig
from openbook.models.layers.attention import Attention
from openbook.models.layers.decoder import DecoderModel
from openbook.models.layers.linear import Linear
from openbook.models.layers.mlp import SwiGLU
from openbook.models.layers.moe import SparseMLP
from openbook.models.qwen3_moe import make_experts, make_router


class Qwen2Moe(DecoderModel[Qwen2MoeConfig]):
    """A Qwen 2 MoE language model."""

    def make_attention(self, layer: int) -> Attention:
        """See `DecoderModel.make_attention`."""
        return Attention(self.config, self.ops, layer, has_qkv_bias=True)

    def make_mlp(self, layer: int) -> nn.Module:
        """See `DecoderModel.make_mlp`."""
        config, ops = self.config, self.ops
        if not config.has_experts(layer):
            return SwiGLU(config, ops)
        shared_expert = SwiGLU(config, ops, config.shared_expert_intermediate_size)
        shared_expert_gate = Linear(config.hidden_size, 1, ops)
        return SparseMLP(ops, make_router(config, ops), make_experts(config, ops), shared_expert, shared_expert_gate)
