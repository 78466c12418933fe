"""The shapes of Qwen 2 MoE (arXiv 2407.10671) and Qwen 3 MoE (arXiv 2505.09388)."""

from __future__ import annotations

from typing import Any

from openbook.core.errors import UserError
from openbook.models.config import DecoderConfig
from openbook.models.hf_config import take_fixed


class Qwen3MoeConfig(DecoderConfig, frozen=True, kw_only=True):
    """A Qwen with experts; layers without them have a feed-forward of `intermediate_size`.

    num_experts: of a layer. num_experts_per_tok: how many a token goes through. moe_intermediate_size: of one expert.
    norm_topk_prob: whether the weights of the chosen experts are divided by their sum. decoder_sparse_step: the last of
    every so many layers has experts. mlp_only_layers: layers, from 0, that have none all the same.
    """

    model_type: str = "qwen3_moe"
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def has_experts(self, layer: int) -> bool:
        """Whether decoder layer `layer` has experts."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")
        if self.num_experts_per_tok > self.num_experts:
            raise UserError(
                f"model: num_experts_per_tok is {self.num_experts_per_tok}, there are {self.num_experts} num_experts: "
                "change one of them"
            )
        if beyond := [layer for layer in self.mlp_only_layers if not 0 <= layer < self.num_hidden_layers]:
            raise UserError(
                f"model: mlp_only_layers names layer {beyond[0]}, expected 0 to {self.num_hidden_layers - 1}: remove it"
            )
        if self.sliding_window is not None or self.layer_types is not None:
            raise UserError(f"model: {self.model_type} has no sliding window: remove sliding_window and layer_types")


class Qwen2MoeConfig(Qwen3MoeConfig, frozen=True, kw_only=True):
    """shared_expert_intermediate_size: of the expert that every token goes through."""

    model_type: str = "qwen2_moe"
    shared_expert_intermediate_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("shared_expert_intermediate_size")


# What files of Qwen 3 Coder say beside the keys of its family.
_QWEN3_MOE_FIXED = {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}


def read_qwen_moe(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Drop what published files say about windows that are off, and read the newer name of num_experts."""
    if values.get("model_type") == "qwen3_moe":
        values = take_fixed(values, _QWEN3_MOE_FIXED, where)
    values = {key: value for key, value in values.items() if key not in ("sliding_window", "max_window_layers")}
    kinds = values.pop("layer_types", None)
    if kinds is not None and not (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)):
        raise UserError(f"{where}: layer_types is {kinds!r}, only 'full_attention' is implemented: use another model")
    if "num_local_experts" in values:
        values["num_experts"] = values.pop("num_local_experts")
    if values.get("mlp_only_layers", ()) is None:
        del values["mlp_only_layers"]
    return values
