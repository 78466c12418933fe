"""gpt-oss against Transformers' class."""

from __future__ import annotations

from typing import Any, ClassVar

from checks import ParityChecks

from openbook.models.config import RopeScaling
from openbook.models.configs.gpt_oss import GptOssConfig

YARN = RopeScaling(rope_type="yarn", factor=32.0, original_max_position_embeddings=4096, truncate=False)
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 64,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "rope_theta": 150000.0,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
ALTERNATING = ("sliding_attention", "full_attention", "sliding_attention")


class TestGptOss(ParityChecks):
    CONFIGS: ClassVar = {
        # A window of 4 tokens in the first and third of three layers, and frequencies that YaRN changes.
        "published": GptOssConfig(**SIZES, rope_scaling=YARN, sliding_window=4, layer_types=ALTERNATING),
        # Gate and up are clamped for most tokens.
        "clamped": GptOssConfig(
            **SIZES, rope_scaling=YARN, sliding_window=128, layer_types=ALTERNATING, swiglu_limit=0.3, swiglu_alpha=1.1
        ),
        "all-experts": GptOssConfig(
            **{**SIZES, "num_experts_per_tok": 6}, sliding_window=5, layer_types=("full_attention",) * 3
        ),
    }
