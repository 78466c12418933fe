"""DeepSeek V2 (arXiv 2405.04434), V3 and R1 (arXiv 2412.19437): latent attention, many small experts, some shared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from openbook.models.configs.deepseek import DeepseekConfig, DeepseekV3Config
from openbook.models.layers.decoder import DecoderModel
from openbook.models.layers.mla import LatentAttention
from openbook.models.layers.mlp import SwiGLU
from openbook.models.layers.moe import Experts, SparseMLP
from openbook.models.layers.packed import Fp8Experts
from openbook.ops.base import Ops

# M tokens, D hidden_size, E n_routed_experts, G n_group, k num_experts_per_tok

# What makes a division by a sum of scores safe (DeepseekV3TopkRouter in Transformers, and the authors' code).
_TINY = 1e-20


class V2Router(nn.Module):
    """A softmax over all experts; a group is as good as its best one (section 2.2.2)."""

    def __init__(self, config: DeepseekConfig, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.ops = ops
        self.groups = config.groups
        self.num_chosen = config.num_experts_per_tok
        self.scale = config.routed_scaling_factor

    def scores(self, x_MD: Tensor) -> Tensor:
        """Scores of all experts before anything is done to them, float32 [M, E]."""
        return self.ops.linear(x_MD.float(), self.weight.float())

    def forward(self, x_MD: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, D] to the experts, int64 [M, k], and their weights, [M, k] in the dtype of x."""
        scores_ME = self.ops.softmax(self.scores(x_MD))
        if self.groups != (1, 1):
            grouped = scores_ME.view(len(scores_ME), self.groups[0], -1)
            scores_ME = self.ops.keep_groups(scores_ME, grouped.amax(-1), self.groups[1], 0.0)
        weights_Mk, chosen_Mk = self.ops.top_k(scores_ME, self.num_chosen)
        return chosen_Mk, (weights_Mk * self.scale).to(x_MD.dtype)


class V3Router(V2Router):
    """A sigmoid for each expert; a bias that balances the load takes part in the choice alone (section 2.1.2).

    A group is as good as the sum of its two best.
    """

    def __init__(self, config: DeepseekV3Config, ops: Ops) -> None:
        super().__init__(config, ops)
        self.is_renormalised = config.norm_topk_prob
        # Moved by the load, not by gradients; never narrower than float32, as small steps would be lost.
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        self.e_score_correction_bias: Tensor

    def forward(self, x_MD: Tensor) -> tuple[Tensor, Tensor]:
        """See `V2Router.forward`."""
        scores_ME = self.ops.sigmoid(self.scores(x_MD))
        for_choice = scores_ME + self.e_score_correction_bias
        if self.groups != (1, 1):
            best_two, _ = self.ops.top_k(for_choice.view(len(for_choice), self.groups[0], -1), 2)
            for_choice = self.ops.keep_groups(for_choice, best_two.sum(-1), self.groups[1], -torch.inf)
        _, chosen_Mk = self.ops.top_k(for_choice, self.num_chosen)
        weights_Mk = scores_ME.gather(-1, chosen_Mk)
        if self.is_renormalised:
            weights_Mk = self.ops.shares(weights_Mk, _TINY)
        return chosen_Mk, (weights_Mk * self.scale).to(x_MD.dtype)


class _Deepseek(DecoderModel[Any]):
    def make_attention(self, layer: int) -> LatentAttention:
        """See `DecoderModel.make_attention`."""
        return LatentAttention(self.config, self.ops, layer)

    def make_mlp(self, layer: int) -> nn.Module:
        """See `DecoderModel.make_mlp`."""
        config, ops = self.config, self.ops
        if not config.has_experts(layer):
            return SwiGLU(config, ops)
        return SparseMLP(
            ops,
            self.make_router(),
            self.experts(config.n_routed_experts, config.hidden_size, config.moe_intermediate_size, ops),
            SwiGLU(config, ops, config.moe_intermediate_size * config.n_shared_experts),
        )

    @property
    def experts(self) -> type[Experts]:
        """The class of a layer's experts."""
        return Experts

    def make_router(self) -> nn.Module:
        """What chooses the experts of a layer."""
        return V2Router(self.config, self.ops)


class DeepseekV2(_Deepseek):
    """A DeepSeek V2 language model, Lite included."""


class DeepseekV3(_Deepseek):
    """A DeepSeek V3 or R1 language model, without its head for further tokens (`deepseek_mtp`)."""

    @property
    def experts(self) -> type[Experts]:
        """See `_Deepseek.experts`."""
        return Fp8Experts if self.config.expert_format == "fp8" else Experts

    def make_router(self) -> V3Router:
        """What chooses the experts of a layer."""
        return V3Router(self.config, self.ops)
