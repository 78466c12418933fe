"""A tiny configuration of every model family, and models of random weights."""

from __future__ import annotations

from typing import Any

import torch

from openbook.models.base import CausalModel, init_weights
from openbook.models.config import DecoderConfig, ModelConfig, RopeScaling
from openbook.models.configs.deepseek import DeepseekV2Config, DeepseekV3Config
from openbook.models.configs.gpt2 import GPT2Config
from openbook.models.configs.gpt_oss import GptOssConfig
from openbook.models.configs.qwen2_vl import Qwen2VLConfig, VisionConfig
from openbook.models.configs.qwen_moe import Qwen2MoeConfig, Qwen3MoeConfig
from openbook.models.registry import build_model
from openbook.ops.base import Ops

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 160,
}
EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
YARN = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
ALTERNATING = ("sliding_attention", "full_attention")
VISION = VisionConfig(depth=2, embed_dim=24, num_heads=2, hidden_size=32, mlp_ratio=2, patch_size=4)
IMAGE_TOKEN = 58

# Windows that end inside a block of 16 and that are shorter than one.
FAMILIES: dict[str, ModelConfig] = {
    "gpt2": GPT2Config(**{**SIZES, "num_key_value_heads": 4}),
    "llama": DecoderConfig(**SIZES, model_type="llama", rope_scaling=YARN),
    "mistral": DecoderConfig(**SIZES, model_type="mistral", sliding_window=21, tie_word_embeddings=False),
    "qwen2": DecoderConfig(**SIZES, model_type="qwen2", sliding_window=5, layer_types=ALTERNATING[::-1]),
    "qwen3": DecoderConfig(**SIZES, model_type="qwen3"),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=40),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True),
    "gpt_oss": GptOssConfig(
        **{key: value for key, value in SIZES.items() if key != "intermediate_size"},
        intermediate_size=24,
        num_local_experts=6,
        num_experts_per_tok=2,
        rope_scaling=YARN,
        sliding_window=18,
        layer_types=ALTERNATING,
        tie_word_embeddings=False,
    ),
    "deepseek_v2": DeepseekV2Config(**{**SIZES, **LATENTS}, tie_word_embeddings=False),
    "deepseek_v3": DeepseekV3Config(
        **{**SIZES, **LATENTS}, n_group=4, topk_group=2, rope_scaling=YARN, tie_word_embeddings=False
    ),
    "qwen2_vl": Qwen2VLConfig(
        **SIZES,
        mrope_section=(1, 1, 2),
        vision_config=VISION,
        image_token_id=IMAGE_TOKEN,
        video_token_id=57,
        vision_start_token_id=59,
        vision_end_token_id=60,
    ),
}


def make_model(config: ModelConfig, ops: Ops) -> CausalModel:
    """Norms unlike 1, biases unlike 0, and matrices large enough for attention to matter: logits of order 1."""
    model = build_model(config, ops)
    init_weights(model, 11)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.2
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.3)
    return model.eval()
