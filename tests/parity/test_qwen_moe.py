"""Qwen 2 and 3 MoE against Transformers' classes."""

from __future__ import annotations

from typing import Any, ClassVar

from checks import SIZES, ParityChecks, as_in_a_file
from torch import Tensor

from openbook.models.base import CausalModel
from openbook.models.configs.qwen_moe import Qwen2MoeConfig, Qwen3MoeConfig

MOE_SIZES: dict[str, Any] = {
    **SIZES,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "tie_word_embeddings": False,
}


class QwenMoeChecks(ParityChecks):
    def reference_gradients(self, model: CausalModel, reference: Any) -> dict[str, Tensor]:
        """Transformers stacks the experts in memory; the table tells them apart as in a file."""
        return as_in_a_file(super().reference_gradients(model, reference), model.config)


class TestQwen3Moe(QwenMoeChecks):
    CONFIGS: ClassVar = {
        "plain": Qwen3MoeConfig(**MOE_SIZES),
        "renormalised": Qwen3MoeConfig(**MOE_SIZES, norm_topk_prob=True),
        "every-second": Qwen3MoeConfig(**MOE_SIZES, decoder_sparse_step=2),
        "dense-first-tied": Qwen3MoeConfig(**{**MOE_SIZES, "tie_word_embeddings": True}, mlp_only_layers=(0,)),
    }


class TestQwen2Moe(QwenMoeChecks):
    CONFIGS: ClassVar = {
        "plain": Qwen2MoeConfig(**MOE_SIZES, shared_expert_intermediate_size=40),
        "renormalised-mixed": Qwen2MoeConfig(
            **MOE_SIZES, shared_expert_intermediate_size=40, norm_topk_prob=True, mlp_only_layers=(1,)
        ),
    }
