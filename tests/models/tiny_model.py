"""A tiny model for the tests beside this file."""

from __future__ import annotations

from openbook.models.base import CausalModel, init_weights
from openbook.models.config import DecoderConfig
from openbook.models.registry import build_model
from openbook.ops.torch_ops import TorchOps

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.2,
)


def make_model(seed: int = 0) -> CausalModel:
    model = build_model(CONFIG, TorchOps())
    init_weights(model, seed)
    return model
