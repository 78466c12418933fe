"""gpt-oss (arXiv 2508.10925): alternating windows, a sink in every softmax, and experts that are published in MXFP4."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openbook.models.configs.gpt_oss import GptOssConfig
from openbook.models.layers.attention import Attention
from openbook.models.layers.decoder import DecoderModel
from openbook.models.layers.moe import Experts, SparseMLP
from openbook.models.layers.norm import WideRMSNorm
from openbook.models.layers.packed import Mxfp4Experts
from openbook.ops.base import Ops


class TopKRouter(nn.Module):
    """The experts of highest score; a softmax over their scores alone makes the weights."""

    def __init__(self, hidden_size: int, num_experts: int, num_chosen: int, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts))
        self.ops = ops
        self.num_chosen = num_chosen

    def forward(self, x_MD: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, D] to the experts, int64 [M, k], and their weights, [M, k] in the dtype of x."""
        scores_Mk, chosen_Mk = self.ops.top_k(self.ops.linear(x_MD, self.weight, self.bias), self.num_chosen)
        return chosen_Mk, self.ops.softmax(scores_Mk).to(x_MD.dtype)


class GptOss(DecoderModel[GptOssConfig]):
    """A gpt-oss language model."""

    norm_type = WideRMSNorm

    def make_attention(self, layer: int) -> Attention:
        """See `DecoderModel.make_attention`."""
        return Attention(self.config, self.ops, layer, has_qkv_bias=True, has_output_bias=True, has_sinks=True)

    def make_mlp(self, layer: int) -> SparseMLP:
        """See `DecoderModel.make_mlp`."""
        config, ops = self.config, self.ops
        experts = Mxfp4Experts if config.expert_format == "mxfp4" else Experts
        return SparseMLP(
            ops,
            TopKRouter(config.hidden_size, config.num_local_experts, config.num_experts_per_tok, ops),
            experts(
                config.num_local_experts,
                config.hidden_size,
                config.intermediate_size,
                ops,
                activation=self._activation,
                has_bias=True,
            ),
        )

    def _activation(self, gate_up: Tensor) -> Tensor:
        return self.ops.clamped_swiglu(gate_up, self.config.swiglu_alpha, self.config.swiglu_limit)
