"""The shapes of DeepSeek V2 (arXiv 2405.04434), V3 and R1 (arXiv 2412.19437)."""

from __future__ import annotations

from typing import Any, Literal

from openbook.core.errors import UserError
from openbook.models.config import FP8_BLOCK, CacheLayer, DecoderConfig, ModelConfig


class LatentConfig(DecoderConfig, frozen=True, kw_only=True):
    """A decoder with latent attention; head_dim is that of the rotated part.

    q_lora_rank: features of the queries' latent; None for queries without one. kv_lora_rank: of the latent that the
    cache keeps. qk_nope_head_dim, qk_rope_head_dim: of a head's key, the part without position and the rotated one.
    v_head_dim: of a head's value. rope_interleave: pairs are neighbours, otherwise halves.
    """

    q_lora_rank: int | None = None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool = True

    @property
    def rope_dim(self) -> int:
        """See `DecoderConfig.rope_dim`."""
        return self.qk_rope_head_dim

    @property
    def cache_layers(self) -> tuple[CacheLayer, ...]:
        """See `ModelConfig.cache_layers`: the latent and the rotated part, once for all heads."""
        latent = CacheLayer(1, self.kv_lora_rank + self.qk_rope_head_dim, 0, None)
        return (latent,) * self.num_hidden_layers

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if self.q_lora_rank is not None:
            self.require_positive("q_lora_rank")
        for name, expected in (("num_key_value_heads", "num_attention_heads"), ("head_dim", "qk_rope_head_dim")):
            if getattr(self, name) != getattr(self, expected):
                raise UserError(
                    f"model: {name} is {getattr(self, name)}, expected {expected}, {getattr(self, expected)}: correct "
                    "one of them"
                )
        if self.sliding_window is not None or self.layer_types is not None:
            raise UserError(f"model: {self.model_type} has no sliding window: remove sliding_window and layer_types")


class DeepseekConfig(LatentConfig, frozen=True, kw_only=True):
    """What V2 and V3 share.

    n_routed_experts: of which a token goes through num_experts_per_tok. n_shared_experts: that every token goes
    through. moe_intermediate_size: of one expert. first_k_dense_replace: layers at the bottom without experts.
    n_group, topk_group: experts stand in groups, and a token's are chosen from the best of them; None for one group.
    routed_scaling_factor: on what the routed experts give.
    """

    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    first_k_dense_replace: int = 0
    n_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float = 1.0

    def has_experts(self, layer: int) -> bool:
        """Whether decoder layer `layer` has experts."""
        return layer >= self.first_k_dense_replace

    @property
    def groups(self) -> tuple[int, int]:
        """Number of groups, and of those that a token may choose from."""
        return self.n_group or 1, self.topk_group or 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size")
        self.require_positive("routed_scaling_factor")
        if self.first_k_dense_replace < 0:
            raise UserError(
                f"model: first_k_dense_replace is {self.first_k_dense_replace}, expected a number of layers: correct it"
            )
        num_groups, num_chosen = self.groups
        if num_groups < 1 or self.n_routed_experts % num_groups or not 0 < num_chosen <= num_groups:
            raise UserError(
                f"model: n_group {self.n_group} and topk_group {self.topk_group} do not fit {self.n_routed_experts} "
                "n_routed_experts: expected groups of one size, and not more chosen than there are"
            )
        if self.num_experts_per_tok > self.n_routed_experts // num_groups * num_chosen:
            raise UserError(
                f"model: num_experts_per_tok is {self.num_experts_per_tok}, the chosen groups have "
                f"{self.n_routed_experts // num_groups * num_chosen} experts: change one of them"
            )


class DeepseekV2Config(DeepseekConfig, frozen=True, kw_only=True):
    """topk_method: "greedy" over all experts, or "group_limited_greedy" over those of the best groups."""

    model_type: str = "deepseek_v2"
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"

    @property
    def groups(self) -> tuple[int, int]:
        """See `DeepseekConfig.groups`."""
        return (1, 1) if self.topk_method == "greedy" else super().groups


class DeepseekV3Config(DeepseekConfig, frozen=True, kw_only=True):
    """norm_topk_prob: weights of the chosen experts are divided by their sum.

    num_nextn_predict_layers: of heads for further tokens, which a file may carry behind its decoder layers.
    expert_format: in which the experts' matrices stay packed; None if they are not.
    """

    model_type: str = "deepseek_v3"
    norm_topk_prob: bool = True
    num_nextn_predict_layers: int = 0
    expert_format: Literal["fp8"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups != (1, 1) and self.n_routed_experts < 2 * self.groups[0]:
            raise UserError(
                f"model: {self.n_routed_experts} n_routed_experts in n_group {self.n_group} are fewer than two a "
                "group: change one of them"
            )
        if self.num_nextn_predict_layers < 0:
            raise UserError(
                f"model: num_nextn_predict_layers is {self.num_nextn_predict_layers}, expected 0 or more: correct it"
            )


def read_deepseek(values: dict[str, Any], where: str) -> dict[str, Any]:
    """head_dim, where config.json says it at all, is that of the rotated part."""
    values = dict(values)
    rope_dim = values.get("qk_rope_head_dim")
    if (given := values.pop("head_dim", None)) not in (None, rope_dim):
        raise UserError(f"{where}: head_dim is {given!r}, expected qk_rope_head_dim, {rope_dim!r}: correct it")
    return {**values, "head_dim": rope_dim}


def read_fp8(values: dict[str, Any], where: str) -> dict[str, Any]:
    """`quantization_config` of the published files: FP8 E4M3 in squares.

    Raises:
        UserError: another quantisation.
    """
    values = dict(values)
    given = values.pop("quantization_config", None)
    if given is None:
        return values
    if not isinstance(given, dict):
        raise UserError(f"{where}: quantization_config is {given!r}, expected an object: fetch the file again")
    for key, expected in _FP8.items():
        # Without squares there is one scale a matrix: another format. "fmt" is left out by Transformers.
        if (one := given.get(key, expected if key == "fmt" else None)) != expected:
            raise UserError(
                f"{where}: quantization_config has {key} {one!r}, only {expected!r} is implemented: use another model"
            )
    return {**values, "expert_format": "fp8"}


def write_fp8(values: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The reverse of `read_fp8`. All other matrices were expanded when they were loaded, and are named as such."""
    values = dict(values)
    if values.pop("expert_format") is not None:
        values["quantization_config"] = {**_FP8, "modules_to_not_convert": _NOT_PACKED}
    return values


_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
_NOT_PACKED = ["self_attn", "mlp.gate", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "shared_experts", "lm_head"]
