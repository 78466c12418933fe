"""The shape of Qwen 2 VL and QVQ (arXiv 2409.12191)."""

from __future__ import annotations

from typing import Any

from openbook.core.config import Config
from openbook.core.errors import UserError
from openbook.models.config import DecoderConfig, ModelConfig
from openbook.models.hf_config import WITHOUT_MEANING, take_fixed


class VisionConfig(Config, frozen=True, kw_only=True):
    """The shape of a vision tower, in the field names of a Hugging Face config.json.

    depth: number of layers. hidden_size: of the decoder, which the tower's output is given to. mlp_ratio: the
    feed-forward is embed_dim times this wide. patch_size: side of a patch, in pixels. temporal_patch_size: number of
    video frames in a patch; an image is repeated. spatial_merge_size: side of the square of patches that becomes one
    token.
    """

    depth: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    hidden_size: int = 3584
    mlp_ratio: int = 4
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    rope_theta: float = 10000.0

    @property
    def patch_dim(self) -> int:
        """Number of values of a patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not 0 < getattr(self, name) < 2**31:
                raise UserError(f"vision_config: {name} is {getattr(self, name)}, expected more than 0: correct it")
        if self.embed_dim % (4 * self.num_heads):
            raise UserError(
                f"vision_config: embed_dim {self.embed_dim} over num_heads {self.num_heads} is not a multiple of 4, "
                "which two rotated axes need: change one of them"
            )


class Qwen2VLConfig(DecoderConfig, frozen=True, kw_only=True):
    """A Qwen 2 decoder, its vision tower, and the tokens that stand for images and videos.

    mrope_section: how many of a head's rotated pairs turn with the position in time, rows and columns, in that order.
    """

    model_type: str = "qwen2_vl"
    vision_config: VisionConfig
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            raise UserError(
                f"model: head_dim {self.head_dim} times num_attention_heads {self.num_attention_heads} is not "
                f"hidden_size {self.hidden_size}, as Qwen 2 VL expects: correct one of them"
            )
        if min(self.mrope_section) < 0 or 2 * sum(self.mrope_section) != self.head_dim:
            raise UserError(
                f"model: mrope_section is {list(self.mrope_section)}, expected three counts of pairs that add up to "
                f"{self.head_dim // 2}, half of head_dim: correct them"
            )
        if self.vision_config.hidden_size != self.hidden_size:
            raise UserError(
                f"model: hidden_size of vision_config is {self.vision_config.hidden_size}, expected the decoder's "
                f"{self.hidden_size}: correct one of them"
            )
        if not 0 <= self.image_token_id < self.vocab_size:
            raise UserError(
                f"model: image_token_id is {self.image_token_id}, expected less than vocab_size {self.vocab_size}: "
                "correct it"
            )


VISION_FIXED = {"hidden_act": "quick_gelu"}
# Beside WITHOUT_MEANING: what the published files say without effect.
_VISION_IGNORED = frozenset({"model_type", "initializer_range"})
_OUTER = (
    "architectures",
    "model_type",
    "tie_word_embeddings",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_config",
)


def flatten_qwen2_vl(values: dict[str, Any], where: str) -> dict[str, Any]:
    """A config.json with `text_config` (from Transformers 5 on) or with its content in place (before), as the latter.

    Raises:
        UserError: a part is no object, or has a value that we do not implement.
    """
    outer = dict(values)
    text, vision = (_object(outer.pop(key, None) or {}, key, where) for key in ("text_config", "vision_config"))
    inner_tied = text.pop("tie_word_embeddings", None)  # where versions before 5 may have it
    text.pop("model_type", None)
    values = {**outer, **text, "vision_config": _vision_values(vision, where)}
    values["tie_word_embeddings"] = outer.get("tie_word_embeddings") or inner_tied or False
    for key in ("rope_parameters", "rope_scaling"):
        rope = _object(values.get(key) or {}, key, where)
        if (section := rope.pop("mrope_section", None)) is not None:
            values["mrope_section"] = section
        for kind in ("type", "rope_type"):
            if rope.get(kind) == "mrope":  # as it was called before the section alone said so
                del rope[kind]
        values[key] = rope
    return values


def nest_qwen2_vl(values: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The reverse of `flatten_qwen2_vl`, with `text_config`."""
    assert isinstance(config, Qwen2VLConfig)
    text = {key: value for key, value in values.items() if key not in (*_OUTER, "mrope_section", "head_dim")}
    for key in ("rope_parameters", "rope_scaling"):
        if key in text:
            text[key] = {**text[key], "mrope_section": list(config.mrope_section)}
    vision = dict(values["vision_config"])
    rope = {"rope_type": "axial", "rope_theta": vision.pop("rope_theta")}
    vision = {"model_type": "qwen2_vl_vision", **vision, **VISION_FIXED, "rope_parameters": rope}
    text = {"model_type": "qwen2_vl_text", **text}
    return {**{key: values[key] for key in _OUTER}, "text_config": text, "vision_config": vision}


def _vision_values(vision: dict[str, Any], where: str) -> dict[str, Any]:
    here = f"{where}: vision_config"
    vision = take_fixed(vision, VISION_FIXED, here)
    vision = {key: value for key, value in vision.items() if key not in WITHOUT_MEANING | _VISION_IGNORED}
    rope = _object(vision.pop("rope_parameters", None) or {}, "rope_parameters", here)
    rope = take_fixed(rope, {"rope_type": "axial"}, f"{here}: rope_parameters")
    vision |= {key: value for key, value in rope.items() if value is not None}  # rope_theta; others are refused
    if "in_chans" in vision:  # how the published files call it
        vision.setdefault("in_channels", vision.pop("in_chans"))
    spatial = vision.pop("spatial_patch_size", None)  # another name for the same number
    if spatial is not None and spatial != vision.setdefault("patch_size", spatial):
        raise UserError(
            f"{here}: spatial_patch_size is {spatial!r} and patch_size {vision['patch_size']!r}, expected the same: "
            "fetch the file again"
        )
    return vision


def _object(value: Any, key: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key} is {value!r}, expected an object: fetch the file again")
    return dict(value)
