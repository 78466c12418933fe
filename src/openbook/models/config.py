"""The shape of a model, in the field names of a Hugging Face config.json."""

from __future__ import annotations

from openbook.core.config import Config
from openbook.core.errors import UserError

# Beyond these a configuration is damaged, and building the model would not end or would overflow.
_MOST = 2**31 - 1
_MOST_LAYERS = 10_000


class ModelConfig(Config, frozen=True, kw_only=True):
    """A decoder-only transformer. Sizes are counts of features, heads or tokens.

    Raises:
        UserError: a size is not positive, or sizes that must divide do not.
    """

    model_type: str = "qwen3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "rope_theta",
            "max_position_embeddings",
            "initializer_range",
        ):
            limit = _MOST_LAYERS if name == "num_hidden_layers" else _MOST
            if not 0 < getattr(self, name) <= limit:
                raise UserError(
                    f"model: {name} is {getattr(self, name)}, expected more than 0 and at most {limit:,}: correct it"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model: num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}: change one of them"
            )
        if self.head_dim % 2:
            raise UserError(f"model: head_dim {self.head_dim} is odd, rotary embedding needs pairs: make it even")
