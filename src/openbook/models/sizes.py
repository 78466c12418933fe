"""How large a model is, from its configuration alone: parameters, and bytes of cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

from openbook.models.config import ModelConfig

# Bytes of one weight: 128 x 128 blocks of FP8 with a float32 scale (DeepSeek V3); 32 weights in a block of 34 or 18
# bytes (GGUF's Q8_0 and Q4_0); 32 in 17 bytes (MXFP4, as gpt-oss keeps its experts).
FP8_BYTES = 1 + 4 / 128**2
Q8_0_BYTES = 34 / 32
Q4_0_BYTES = 18 / 32
MXFP4_BYTES = 17 / 32

# Field names under which families keep the number of experts to choose from.
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters.

    total: all. matrices: those in tensors of two or more axes, which quantised forms shorten. experts: those of the
    routed experts. embedding: those of the input embedding, where it is not the output projection as well. active:
    those that take part in one token, the input embedding included.
    """

    total: int
    matrices: int
    experts: int
    embedding: int
    active: int


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Count the parameters of our model of that shape; no memory is taken.

    Raises:
        UserError: the family is not known.
    """
    from openbook.models.registry import build_model
    from openbook.ops.torch_ops import TorchOps

    model = build_model(config, TorchOps(), device="meta")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    embedding = sum(size for name, size in sizes.items() if name.endswith(("embed_tokens.weight", "wte.weight")))
    total = sum(sizes.values())
    idle = 0
    if experts:
        num_experts = next(getattr(config, name) for name in _NUM_EXPERTS if hasattr(config, name))
        idle = experts - experts * getattr(config, "num_experts_per_tok", num_experts) // num_experts
    return ParameterCounts(total, matrices, experts, 0 if config.tie_word_embeddings else embedding, total - idle)


def weight_bytes(counts: ParameterCounts) -> dict[str, int]:
    """Bytes of all weights by the format of the matrices; what is not quantised is bfloat16, in GGUF float32."""
    rest = counts.total - counts.matrices
    formats = {
        "bfloat16": counts.total * 2.0,
        "FP8": counts.matrices * FP8_BYTES + rest * 2,
        "Q8_0": counts.matrices * Q8_0_BYTES + rest * 4,
        "Q4_0": counts.matrices * Q4_0_BYTES + rest * 4,
    }
    if counts.experts:
        formats["MXFP4 experts"] = counts.experts * MXFP4_BYTES + (counts.total - counts.experts) * 2
    return {name: round(size) for name, size in formats.items()}


def cache_bytes(config: ModelConfig, num_tokens: int, item_bytes: float, num_sequences: int = 1) -> int:
    """Bytes of keys and values for sequences of `num_tokens` tokens; sliding windows keep only their latest ones.

    Args:
        item_bytes: of one number: 2 for bfloat16, 4 for float32, `rounded_item_bytes` for 8 bits.
    """
    kept = sum(
        min(num_tokens, layer.window or num_tokens) * layer.num_heads * (layer.key_dim + layer.value_dim)
        for layer in config.cache_layers
    )
    return math.ceil(kept * item_bytes) * num_sequences


def rounded_item_bytes(config: ModelConfig) -> float:
    """Bytes of one number in a cache of 8 bits, with its share of the scales: of a key's 32, and of a whole value's."""
    return 1 + (4 / 32 + 4 / config.head_dim) / 2


def longest_context(config: ModelConfig, num_bytes: int, item_bytes: float) -> int:
    """Tokens of one sequence whose cache takes at most `num_bytes`, up to the model's limit."""
    low, high = 0, config.max_position_embeddings
    while low < high:
        middle = math.ceil((low + high) / 2)
        low, high = (middle, high) if cache_bytes(config, middle, item_bytes) <= num_bytes else (low, middle - 1)
    return low
