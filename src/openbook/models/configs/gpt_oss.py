"""The shape of gpt-oss (arXiv 2508.10925)."""

from __future__ import annotations

from typing import Any, Literal

from openbook.core.errors import UserError
from openbook.models.config import MXFP4_BLOCK, DecoderConfig, ModelConfig

# What a config.json that does not say means (Transformers' GptOssConfig).
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
# What is not packed, as the published files name it.
_NOT_PACKED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


class GptOssConfig(DecoderConfig, frozen=True, kw_only=True):
    """A gpt-oss; `intermediate_size` is that of one expert.

    num_local_experts: of a layer. num_experts_per_tok: how many a token goes through. swiglu_limit: what gate and up
    are clamped to. swiglu_alpha: factor inside the gate's sigmoid. expert_format: in which the experts' matrices stay
    packed; None if they are not.
    """

    model_type: str = "gpt_oss"
    num_local_experts: int
    num_experts_per_tok: int = 4
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    expert_format: Literal["mxfp4"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_local_experts", "num_experts_per_tok", "swiglu_limit", "swiglu_alpha")
        if self.num_experts_per_tok > self.num_local_experts:
            raise UserError(
                f"model: num_experts_per_tok is {self.num_experts_per_tok}, there are {self.num_local_experts} "
                "num_local_experts: change one of them"
            )
        for name in ("hidden_size", "intermediate_size"):
            if self.expert_format and (size := getattr(self, name)) % MXFP4_BLOCK:
                raise UserError(
                    f"model: {name} is {size}, experts in MXFP4 need a multiple of {MXFP4_BLOCK}: correct it or remove "
                    "quantization_config"
                )


def read_gpt_oss(values: dict[str, Any], where: str) -> dict[str, Any]:
    """What config.json leaves to the class, says twice, or says about packed experts.

    Raises:
        UserError: another quantisation than MXFP4, or two numbers of experts that contradict.
    """
    values = dict(values)
    if values.get("rope_scaling") is None and values.get("rope_parameters") is None:
        values["rope_scaling"] = _ROPE
    layers = values.get("num_hidden_layers")
    if values.get("layer_types") is None and isinstance(layers, int) and 0 < layers <= 10_000:
        values["layer_types"] = [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]
    # The name in the authors' own code, which their files give beside that of Transformers.
    twice = values.pop("experts_per_token", None)
    if twice is not None and values.setdefault("num_experts_per_tok", twice) != twice:
        raise UserError(
            f"{where}: experts_per_token is {twice!r} but num_experts_per_tok is {values['num_experts_per_tok']!r}: "
            "correct one of them"
        )
    quantisation = values.pop("quantization_config", None)
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        if method != "mxfp4":
            raise UserError(f"{where}: quant_method is {method!r}, only 'mxfp4' is implemented: use another model")
        values["expert_format"] = "mxfp4"
    return values


def write_gpt_oss(values: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The reverse of `read_gpt_oss`."""
    values = dict(values)
    if values.pop("expert_format") is not None:
        values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": _NOT_PACKED}
    return values
