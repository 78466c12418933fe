"""gpt-oss. Its experts' matrices are either plain, published as [experts, in, out], or MXFP4 blocks and scales.

The packed layout (also what a GGUF file has to be brought to): `mlp.experts.gate_up_proj_blocks`, uint8
[experts, 2 I, D / 32, 16], two neighbours of a row in a byte, the first one in its low half;
`mlp.experts.gate_up_proj_scales`, uint8 [experts, 2 I, D / 32], exponent plus 127; `down_proj_*` likewise, [experts, D,
I / 32, ...]. Rows of gate and up take turns, gate first, in all forms. In memory it is the same layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from openbook.checkpoint.key_map import Entry, KeyMap, same
from openbook.checkpoint.key_maps.dense import ATTENTION, EMBEDDING, HEAD, LAYER, NORMS, qkv
from openbook.models.config import ModelConfig
from openbook.models.configs.gpt_oss import GptOssConfig

if TYPE_CHECKING:
    from torch import Tensor

_EXPERTS = LAYER + "mlp.experts."
_MATRICES = ("gate_up_proj", "down_proj")


def _is_packed(config: ModelConfig) -> bool:
    assert isinstance(config, GptOssConfig)
    return config.expert_format is not None


def _is_plain(config: ModelConfig) -> bool:
    return not _is_packed(config)


def _join(parts: list[Tensor], config: ModelConfig) -> Tensor:
    return parts[0].mT.contiguous()


def _split(tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
    return (tensor.mT.contiguous(),)


GPT_OSS = KeyMap(
    (
        EMBEDDING,
        *NORMS,
        *ATTENTION,
        qkv("bias"),
        same(LAYER + "self_attn.o_proj.bias"),
        same(LAYER + "self_attn.sinks"),
        *(Entry(f"{LAYER}mlp.gate.{kind}", (f"{LAYER}mlp.router.{kind}",)) for kind in ("weight", "bias")),
        *(
            Entry(_EXPERTS + name, (_EXPERTS + name,), join=_join, split=_split, is_present=_is_plain)
            for name in _MATRICES
        ),
        *(
            Entry(f"{_EXPERTS}{name}.{kind}", (f"{_EXPERTS}{name}_{kind}",), is_present=_is_packed)
            for name in _MATRICES
            for kind in ("blocks", "scales")
        ),
        *(same(f"{_EXPERTS}{name}_bias") for name in _MATRICES),
        *HEAD,
    )
)
