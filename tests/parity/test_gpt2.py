"""GPT-2 against Transformers' class."""

from __future__ import annotations

from typing import Any, ClassVar

from checks import ParityChecks

from openbook.models.configs.gpt2 import GPT2Config

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 16,
}


class TestGPT2(ParityChecks):
    CONFIGS: ClassVar = {
        "published": GPT2Config(**SIZES),
        "untied-narrow": GPT2Config(**{**SIZES, "intermediate_size": 40}, tie_word_embeddings=False),
        "layer-scale": GPT2Config(**SIZES, scale_attn_by_inverse_layer_idx=True, layer_norm_epsilon=1e-3),
        "no-scale": GPT2Config(**SIZES, scale_attn_weights=False),
    }
