"""The shape of GPT-2 (Radford et al. 2019), and of GPT-3 (arXiv 2005.14165)."""

from __future__ import annotations

from typing import Any

from openbook.core.errors import UserError
from openbook.models.config import ModelConfig


class GPT2Config(ModelConfig, frozen=True, kw_only=True):
    """A decoder with LayerNorm, biases, and a learned vector for each position.

    layer_norm_epsilon: added to the variance. scale_attn_weights: whether attention scores are divided by the root of
    head_dim. scale_attn_by_inverse_layer_idx: whether they are also divided by the layer's number, from 1.
    """

    model_type: str = "gpt2"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("layer_norm_epsilon")
        if self.num_key_value_heads != self.num_attention_heads:
            raise UserError(
                f"model: num_key_value_heads is {self.num_key_value_heads}, {self.model_type} has as many as "
                f"num_attention_heads, {self.num_attention_heads}: change one of them"
            )
        width = self.num_attention_heads * self.head_dim
        if self.model_type == "gpt2" and width != self.hidden_size:
            raise UserError(
                f"model: {self.num_attention_heads} heads of {self.head_dim} do not make hidden_size "
                f"{self.hidden_size}: change one of them"
            )


class GPT3Config(GPT2Config, frozen=True, kw_only=True):
    """GPT-2 whose second, fourth, ... layer sees a band only; heads need not fill the hidden size (the paper's XL).

    local_window: tokens that a query of those layers sees, itself included. The paper does not say how many.
    """

    model_type: str = "gpt3"
    local_window: int

    def window(self, layer: int) -> int | None:
        """See `ModelConfig.window`."""
        return self.local_window if layer % 2 else None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("local_window")


# Ours and theirs.
_FIELDS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
}
# tanh's form of GELU under its two names.
_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")


def read_gpt2(values: dict[str, Any], where: str) -> dict[str, Any]:
    """GPT-2's own names of sizes to our fields; n_ctx is what n_positions was called before.

    Raises:
        UserError: another activation than the tanh form of GELU.
    """
    values = dict(values)
    n_ctx = values.pop("n_ctx", None)
    for ours, theirs in _FIELDS.items():
        if theirs in values:
            values[ours] = values.pop(theirs)
    if n_ctx is not None:
        values.setdefault("max_position_embeddings", n_ctx)
    if (activation := values.pop("activation_function", _ACTIVATIONS[0])) not in _ACTIVATIONS:
        raise UserError(
            f"{where}: activation_function is {activation!r}, only {', '.join(_ACTIVATIONS)} are implemented: use "
            "another model"
        )
    hidden_size = values.get("hidden_size")
    if values.get("intermediate_size") is None and isinstance(hidden_size, int):
        values["intermediate_size"] = 4 * hidden_size
    return values


def write_gpt2(values: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The reverse of `read_gpt2`."""
    left_out = {"num_key_value_heads"} | ({"head_dim"} if config.model_type == "gpt2" else set())
    values = {_FIELDS.get(key, key): value for key, value in values.items() if key not in left_out}
    return {**values, "activation_function": _ACTIVATIONS[0]}
