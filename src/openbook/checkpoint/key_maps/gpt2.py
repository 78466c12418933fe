"""GPT-2 and what has its shape. Its files hold matrices as [in, out], the transpose of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from openbook.checkpoint.key_map import Entry, KeyMap, same
from openbook.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

_OURS = "model.layers.{layer}."
_THEIRS = "transformer.h.{layer}."
# Ours and theirs, in a layer.
_NORMS = {"attn_norm": "ln_1", "mlp_norm": "ln_2"}
_MATRICES = {
    "self_attn.qkv_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


def _join(parts: list[Any], config: ModelConfig) -> Any:
    return parts[0].mT


def _split(tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
    return (tensor.t().contiguous(),)


GPT2 = KeyMap(
    (
        Entry("model.embed_tokens.weight", ("transformer.wte.weight",)),
        Entry("model.embed_positions.weight", ("transformer.wpe.weight",)),
        *(
            Entry(f"{_OURS}{ours}.{kind}", (f"{_THEIRS}{theirs}.{kind}",))
            for ours, theirs in _NORMS.items()
            for kind in ("weight", "bias")
        ),
        *(
            Entry(f"{_OURS}{ours}.weight", (f"{_THEIRS}{theirs}.weight",), join=_join, split=_split)
            for ours, theirs in _MATRICES.items()
        ),
        *(Entry(f"{_OURS}{ours}.bias", (f"{_THEIRS}{theirs}.bias",)) for ours, theirs in _MATRICES.items()),
        Entry("model.norm.weight", ("transformer.ln_f.weight",)),
        Entry("model.norm.bias", ("transformer.ln_f.bias",)),
        same("lm_head.weight"),
    ),
    # Files of the bare decoder leave the prefix out.
    renames=((r"^(wte|wpe|ln_f|h\.\d+)\.", r"transformer.\1."),),
    # Causal masks and what they fill in, which old files carry.
    ignored=(r"\.attn\.(bias|masked_bias)$",),
    embedding="transformer.wte.weight",
)
