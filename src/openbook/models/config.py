"""The shape of a model, in the field names of a Hugging Face config.json."""

from __future__ import annotations

from typing import Literal, NamedTuple

from openbook.core.config import Config
from openbook.core.errors import UserError

# Beyond these a configuration is damaged, and building the model would not end or would overflow.
_MOST = 2**31 - 1
MOST_LAYERS = 10_000

# Block sizes of packed formats.
MXFP4_BLOCK = 32  # weights that share a scale
FP8_BLOCK = 128  # rows, and columns, that share a scale

Grid = tuple[int, int]  # rows and columns of an image's patches

LayerType = Literal["full_attention", "sliding_attention"]


class CacheLayer(NamedTuple):
    """What a decoder layer keeps of each token: keys [num_heads, key_dim] and values [num_heads, value_dim].

    value_dim is 0 where values are computed from the keys (a latent). window: number of latest tokens that are looked
    at, the present one included; None for all.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    window: int | None


class ModelConfig(Config, frozen=True, kw_only=True):
    """What every family has: a decoder-only transformer. Sizes are counts of features, heads or tokens.

    Raises:
        UserError: a size is not positive, or sizes that must divide do not.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    @property
    def cache_layers(self) -> tuple[CacheLayer, ...]:
        """One entry for each decoder layer."""
        return tuple(
            CacheLayer(self.num_key_value_heads, self.head_dim, self.head_dim, self.window(layer))
            for layer in range(self.num_hidden_layers)
        )

    def window(self, layer: int) -> int | None:
        """Number of latest tokens that decoder layer `layer` looks at, the present one included; None for all."""
        return None

    def require_positive(self, *names: str) -> None:
        """Check that the named sizes can be sizes."""
        for name in names:
            limit = MOST_LAYERS if name == "num_hidden_layers" else _MOST
            if not 0 < getattr(self, name) <= limit:
                raise UserError(
                    f"model: {name} is {getattr(self, name)}, expected more than 0 and at most {limit:,}: correct it"
                )

    def __post_init__(self) -> None:
        self.require_positive(
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "initializer_range",
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model: num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}: change one of them"
            )


class RopeScaling(Config, frozen=True, kw_only=True):
    """How rotary frequencies are changed for contexts longer than those of pre-training.

    rope_type: "linear" (arXiv 2306.15595), "llama3" (Llama 3.1), "yarn" (arXiv 2309.00071). factor: by which the
    context was lengthened. original_max_position_embeddings: before that, in tokens. low_freq_factor, high_freq_factor:
    of llama3. The rest is of yarn: beta_fast, beta_slow: rotations over the original context between which frequencies
    are blended; truncate: whether that range is widened to whole dimensions; attention_factor: on cos and sin, None
    for what follows from factor, mscale and mscale_all_dim.
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise UserError(f"model: the rope factor is {self.factor}, expected more than 0: correct it")
        if self.rope_type != "linear" and not self.original_max_position_embeddings:
            raise UserError(
                f"model: original_max_position_embeddings is {self.original_max_position_embeddings}, expected the "
                f"context before the {self.rope_type} scaling in tokens: add it"
            )
        if self.rope_type == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                f"model: low_freq_factor is {self.low_freq_factor} and high_freq_factor {self.high_freq_factor}, "
                "expected the first above 0 and below the second: correct them"
            )


class DecoderConfig(ModelConfig, frozen=True, kw_only=True):
    """A decoder with RMSNorm and rotary embedding, which most families are.

    rms_norm_eps: added to the mean square. rope_theta: base of the rotary frequencies. rope_scaling: None for none.
    sliding_window: window of the layers whose `layer_types` entry is "sliding_attention", of all if there is no such
    list.
    """

    model_type: str = "qwen3"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    layer_types: tuple[LayerType, ...] | None = None

    @property
    def rope_dim(self) -> int:
        """Number of features of a head that are rotated."""
        return self.head_dim

    def window(self, layer: int) -> int | None:
        """See `ModelConfig.window`."""
        is_windowed = self.layer_types is None or self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if is_windowed else None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("rms_norm_eps", "rope_theta")
        if self.sliding_window is not None:
            self.require_positive("sliding_window")
        if self.rope_dim % 2:
            raise UserError(f"model: head_dim {self.rope_dim} is odd, rotary embedding needs pairs: make it even")
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise UserError(
                f"model: layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers: "
                "give one a layer"
            )
        if self.layer_types is not None and "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise UserError("model: layer_types names sliding_attention but sliding_window is missing: add it")
