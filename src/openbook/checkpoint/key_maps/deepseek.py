"""DeepSeek V2, V3 and R1."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from openbook.checkpoint.key_map import Entry, KeyMap, same, spell_out
from openbook.checkpoint.key_maps.dense import EMBEDDING, FREQUENCIES, HEAD, LAYER, MLP, NORMS
from openbook.checkpoint.key_maps.moe import expert_entries
from openbook.models.config import ModelConfig
from openbook.models.configs.deepseek import DeepseekConfig, DeepseekV3Config

if TYPE_CHECKING:
    from torch import Tensor

_ATTENTION = LAYER + "self_attn."
_MLP = LAYER + "mlp."


def _deepseek(config: ModelConfig) -> DeepseekConfig:
    assert isinstance(config, DeepseekConfig)
    return config


def _sparse_layers(config: ModelConfig) -> list[int]:
    return [layer for layer in range(config.num_hidden_layers) if _deepseek(config).has_experts(layer)]


def _dense_layers(config: ModelConfig) -> list[int]:
    return [layer for layer in range(config.num_hidden_layers) if not _deepseek(config).has_experts(layer)]


def _has_query_latent(config: ModelConfig) -> bool:
    return _deepseek(config).q_lora_rank is not None


def _shared_rows(config: ModelConfig) -> tuple[int, ...]:
    return (_deepseek(config).moe_intermediate_size * _deepseek(config).n_shared_experts,) * 2


def _num_experts(config: ModelConfig) -> int:
    return _deepseek(config).n_routed_experts


def _part_by_part(parts: list[Tensor], config: ModelConfig) -> Tensor:
    """Theirs has the rows of a head together, its keys' and its values'; ours those of all keys, then of all values."""
    import torch

    deepseek = _deepseek(config)
    rows = [deepseek.qk_nope_head_dim, deepseek.v_head_dim]
    by_head = parts[0].view(deepseek.num_attention_heads, sum(rows), -1)
    return torch.cat([part.flatten(0, 1) for part in torch.split(by_head, rows, 1)])


def _head_by_head(tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
    import torch

    deepseek = _deepseek(config)
    num_heads = deepseek.num_attention_heads
    parts = torch.split(tensor, [num_heads * deepseek.qk_nope_head_dim, num_heads * deepseek.v_head_dim])
    return (torch.cat([part.view(num_heads, -1, part.shape[1]) for part in parts], 1).flatten(0, 1),)


def _is_packed(config: ModelConfig) -> bool:
    return isinstance(config, DeepseekV3Config) and config.expert_format is not None


def _is_plain(config: ModelConfig) -> bool:
    return not _is_packed(config)


def _packed(name: str, parts: tuple[str, ...]) -> tuple[Entry, ...]:
    """Experts in FP8, published as one matrix and its scales each; ours stack them."""

    def join(given: list[Tensor], config: ModelConfig) -> Tensor:
        import torch

        # Bytes: FP8 numbers cannot be put together as such.
        stacked = torch.cat([one.view(torch.uint8) for one in given]).view(given[0].dtype)
        return stacked.view(_num_experts(config), -1, given[0].shape[1])

    def split(tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
        return [part for matrix in tensor.unbind() for part in matrix.chunk(len(parts))]

    published = _MLP + "experts.{part}."
    return tuple(
        Entry(
            f"{_MLP}experts.{name}.{ours}",
            tuple(f"{published}{part}.{theirs}" for part in parts),
            join=join,
            split=split,
            layers=_sparse_layers,
            parts=lambda config: range(_num_experts(config)),
            is_present=_is_packed,
            is_float32=ours == "scales",
        )
        for ours, theirs in (("weight", "weight"), ("scales", "weight_scale_inv"))
    )


def _behind_the_last_layer(config: ModelConfig) -> tuple[str, ...]:
    """Heads for further tokens: `load_prediction_head` reads them."""
    assert isinstance(config, DeepseekV3Config)
    first, count = config.num_hidden_layers, config.num_nextn_predict_layers
    return tuple(rf"^model\.layers\.{layer}\." for layer in range(first, first + count))


_QUERIES = (
    *(
        replace(same(f"{_ATTENTION}{name}.weight"), is_present=_has_query_latent)
        for name in ("q_a_proj", "q_a_layernorm", "q_b_proj")
    ),
    replace(same(_ATTENTION + "q_proj.weight"), is_present=lambda config: not _has_query_latent(config)),
)
_LATENTS = (
    *(same(f"{_ATTENTION}{name}.weight") for name in ("kv_a_proj_with_mqa", "kv_a_layernorm", "o_proj")),
    Entry(_ATTENTION + "kv_b_proj.weight", (_ATTENTION + "kv_b_proj.weight",), join=_part_by_part, split=_head_by_head),
)
_EXPERTS = (
    *(replace(entry, layers=_dense_layers) for entry in MLP),
    same(_MLP + "gate.weight", _sparse_layers),
    *(replace(entry, is_present=_is_plain) for entry in expert_entries(_sparse_layers, _num_experts)),
    Entry(
        _MLP + "shared_expert.gate_up_proj.weight",
        (_MLP + "shared_experts.gate_proj.weight", _MLP + "shared_experts.up_proj.weight"),
        _shared_rows,
        layers=_sparse_layers,
    ),
    Entry(_MLP + "shared_expert.down_proj.weight", (_MLP + "shared_experts.down_proj.weight",), layers=_sparse_layers),
)
_BIAS = Entry(
    _MLP + "gate.e_score_correction_bias",
    (_MLP + "gate.e_score_correction_bias",),
    layers=_sparse_layers,
    is_float32=True,
)

DEEPSEEK_V2 = KeyMap((EMBEDDING, *NORMS, *_QUERIES, *_LATENTS, *_EXPERTS, *HEAD), ignored=(FREQUENCIES,))
DEEPSEEK_V3 = KeyMap(
    (
        *(EMBEDDING, *NORMS, *_QUERIES, *_LATENTS, *_EXPERTS, _BIAS),
        *_packed("gate_up_proj", ("gate_proj", "up_proj")),
        *_packed("down_proj", ("down_proj",)),
        *HEAD,
    ),
    ignored=(FREQUENCIES,),
    skipped=_behind_the_last_layer,
)


def prediction_head_table(config: DeepseekV3Config) -> KeyMap:
    """The table of the first head for further tokens; what it shares with the model is left out."""
    layer = config.num_hidden_layers
    with_head = msgspec.structs.replace(config, num_hidden_layers=layer + 1, num_nextn_predict_layers=0)
    prefix = f"model.layers.{layer}."
    block = [
        replace(entry, ours="block." + entry.ours.removeprefix(prefix))
        for entry in spell_out(DEEPSEEK_V3, with_head)
        if entry.ours.startswith(prefix)
    ]
    own = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "shared_head.norm"}
    return KeyMap(
        (*block, *(Entry(f"{ours}.weight", (f"{prefix}{theirs}.weight",)) for ours, theirs in own.items())),
        ignored=(rf"^(?!{re.escape(prefix)})", r"\.embed_tokens\.weight$", r"\.shared_head\.head\.weight$"),
    )
