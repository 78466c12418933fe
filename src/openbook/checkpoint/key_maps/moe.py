"""Mixtures of experts: Qwen 2 and 3 MoE. `expert_entries` serves DeepSeek too."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from openbook.checkpoint.key_map import Entry, KeyMap, same
from openbook.checkpoint.key_maps.dense import (
    ATTENTION,
    EMBEDDING,
    HEAD,
    LAYER,
    MLP,
    NORMS,
    QK_NORMS,
    qkv,
)
from openbook.models.config import ModelConfig
from openbook.models.configs.qwen_moe import Qwen2MoeConfig, Qwen3MoeConfig

if TYPE_CHECKING:
    from torch import Tensor


def expert_entries(
    layers: Callable[[ModelConfig], Collection[int]], num_experts: Callable[[ModelConfig], int]
) -> tuple[Entry, ...]:
    """Experts published as one tensor each, `mlp.experts.0.gate_proj.weight`; ours stack those of a layer.

    Files may also hold them stacked, under our names.
    """
    published = f"{LAYER}mlp.experts.{{part}}."

    def stack(parts: list[Tensor], config: ModelConfig) -> Tensor:
        import torch

        return torch.cat(parts).view(num_experts(config), -1, parts[0].shape[1])

    def split_gate_up(tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
        return [part for matrix in tensor.unbind() for part in matrix.chunk(2)]

    def split_down(tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
        return tensor.unbind()

    def parts(config: ModelConfig) -> range:
        return range(num_experts(config))

    return (
        Entry(
            f"{LAYER}mlp.experts.gate_up_proj",
            (f"{published}gate_proj.weight", f"{published}up_proj.weight"),
            join=stack,
            split=split_gate_up,
            layers=layers,
            parts=parts,
            accepts_ours=True,
        ),
        Entry(
            f"{LAYER}mlp.experts.down_proj",
            (f"{published}down_proj.weight",),
            join=stack,
            split=split_down,
            layers=layers,
            parts=parts,
            accepts_ours=True,
        ),
    )


def sparse_layers(config: ModelConfig) -> list[int]:
    """The layers that have experts."""
    assert isinstance(config, Qwen3MoeConfig)
    return [layer for layer in range(config.num_hidden_layers) if config.has_experts(layer)]


def dense_layers(config: ModelConfig) -> list[int]:
    """The layers that have none."""
    assert isinstance(config, Qwen3MoeConfig)
    return [layer for layer in range(config.num_hidden_layers) if not config.has_experts(layer)]


def _num_experts(config: ModelConfig) -> int:
    assert isinstance(config, Qwen3MoeConfig)
    return config.num_experts


def _shared_rows(config: ModelConfig) -> tuple[int, ...]:
    assert isinstance(config, Qwen2MoeConfig)
    return (config.shared_expert_intermediate_size,) * 2


_MOE = (
    *(replace(entry, layers=dense_layers) for entry in MLP),
    same(LAYER + "mlp.gate.weight", sparse_layers),
    *expert_entries(sparse_layers, _num_experts),
)
_SHARED = f"{LAYER}mlp.shared_expert"
_SHARED_EXPERT = (
    Entry(
        f"{_SHARED}.gate_up_proj.weight",
        (f"{_SHARED}.gate_proj.weight", f"{_SHARED}.up_proj.weight"),
        _shared_rows,
        layers=sparse_layers,
    ),
    same(f"{_SHARED}.down_proj.weight", sparse_layers),
    same(f"{_SHARED}_gate.weight", sparse_layers),
)

QWEN3_MOE = KeyMap((EMBEDDING, *NORMS, *ATTENTION, *QK_NORMS, *_MOE, *HEAD))
QWEN2_MOE = KeyMap((EMBEDDING, *NORMS, *ATTENTION, qkv("bias"), *_MOE, *_SHARED_EXPERT, *HEAD))
