"""Qwen 2 VL and QVQ: the table of Qwen 2 and that of the vision tower.

Files have the names that were there first (`model.layers`, `visual`), which every reader knows; those that Transformers
uses inside since version 4.52 (`model.language_model`, `model.visual`) are read too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from openbook.checkpoint.key_map import Entry, KeyMap
from openbook.checkpoint.key_maps.dense import QWEN2
from openbook.models.config import ModelConfig
from openbook.models.configs.qwen2_vl import Qwen2VLConfig

if TYPE_CHECKING:
    from torch import Tensor

_OURS, _THEIRS = "visual.layers.{layer}.", "visual.blocks.{layer}."


def _layers(config: ModelConfig) -> range:
    assert isinstance(config, Qwen2VLConfig)
    return range(config.vision_config.depth)


def _from_kernel(parts: list[Tensor], config: ModelConfig) -> Tensor:
    """The kernel of a convolution [E, channels, frames, rows, columns] as a matrix."""
    return parts[0].reshape(parts[0].shape[:1].numel(), -1)


def _to_kernel(matrix: Tensor, config: ModelConfig) -> Sequence[Tensor]:
    assert isinstance(config, Qwen2VLConfig)
    vision = config.vision_config
    side = vision.patch_size
    return (matrix.view(len(matrix), vision.in_channels, vision.temporal_patch_size, side, side),)


def _pair(ours: str, theirs: str, layers: bool = True) -> tuple[Entry, Entry]:
    """A weight and its bias."""
    return tuple(  # type: ignore[return-value]
        Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",), layers=_layers if layers else None)
        for kind in ("weight", "bias")
    )


VISION = (
    Entry("visual.patch_embed.weight", ("visual.patch_embed.proj.weight",), join=_from_kernel, split=_to_kernel),
    *_pair(_OURS + "attention_norm", _THEIRS + "norm1"),
    *_pair(_OURS + "attention.qkv_proj", _THEIRS + "attn.qkv"),
    *_pair(_OURS + "attention.o_proj", _THEIRS + "attn.proj"),
    *_pair(_OURS + "mlp_norm", _THEIRS + "norm2"),
    *_pair(_OURS + "mlp.up_proj", _THEIRS + "mlp.fc1"),
    *_pair(_OURS + "mlp.down_proj", _THEIRS + "mlp.fc2"),
    *_pair("visual.merger.norm", "visual.merger.ln_q", layers=False),
    *_pair("visual.merger.up_proj", "visual.merger.mlp.0", layers=False),
    *_pair("visual.merger.down_proj", "visual.merger.mlp.2", layers=False),
)

QWEN2_VL = KeyMap(
    (*QWEN2.entries, *VISION),
    renames=((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
    ignored=QWEN2.ignored,
)
