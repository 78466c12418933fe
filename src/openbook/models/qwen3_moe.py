"""Qwen 3 MoE (arXiv 2505.09388): Qwen 3 with experts chosen by a softmax router."""

from __future__ import annotations

from torch import nn

from openbook.models.configs.qwen_moe import Qwen3MoeConfig
from openbook.models.layers.attention import Attention
from openbook.models.layers.decoder import DecoderModel
from openbook.models.layers.mlp import SwiGLU
from openbook.models.layers.moe import Experts, SoftmaxRouter, SparseMLP
from openbook.ops.base import Ops


class Qwen3Moe(DecoderModel[Qwen3MoeConfig]):
    """A Qwen 3 MoE language model."""

    def make_attention(self, layer: int) -> Attention:
        """See `DecoderModel.make_attention`."""
        return Attention(self.config, self.ops, layer, has_qk_norm=True)

    def make_mlp(self, layer: int) -> nn.Module:
        """See `DecoderModel.make_mlp`."""
        if not self.config.has_experts(layer):
            return SwiGLU(self.config, self.ops)
        return SparseMLP(self.ops, make_router(self.config, self.ops), make_experts(self.config, self.ops))


def make_router(config: Qwen3MoeConfig, ops: Ops) -> SoftmaxRouter:
    """What chooses the experts."""
    return SoftmaxRouter(
        config.hidden_size, config.num_experts, config.num_experts_per_tok, ops, is_renormalised=config.norm_topk_prob
    )


def make_experts(config: Qwen3MoeConfig, ops: Ops) -> Experts:
    """The experts of one layer."""
    return Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size, ops)
