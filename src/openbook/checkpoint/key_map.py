"""Tensor names in Hugging Face checkpoints and in our models: one table per family, read in both directions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from openbook.core.errors import UserError
from openbook.models.config import ModelConfig


@dataclass(frozen=True)
class Entry:
    """One of our tensors and the Hugging Face tensors it is made of, stacked along the first axis.

    `{layer}` in a name stands for every layer index. `rows` gives the first axis of each part.
    """

    ours: str
    theirs: tuple[str, ...]
    rows: Callable[[ModelConfig], tuple[int, ...]] | None = None


def _same(name: str) -> Entry:
    return Entry(name, (name,))


def _qkv_rows(config: ModelConfig) -> tuple[int, ...]:
    key_rows = config.num_key_value_heads * config.head_dim
    return config.num_attention_heads * config.head_dim, key_rows, key_rows


def _gate_up_rows(config: ModelConfig) -> tuple[int, ...]:
    return config.intermediate_size, config.intermediate_size


_LAYER = "model.layers.{layer}."

KEY_MAPS: dict[str, tuple[Entry, ...]] = {
    "qwen3": (
        _same("model.embed_tokens.weight"),
        _same(_LAYER + "input_layernorm.weight"),
        Entry(
            _LAYER + "self_attn.qkv_proj.weight",
            tuple(_LAYER + f"self_attn.{part}_proj.weight" for part in "qkv"),
            _qkv_rows,
        ),
        _same(_LAYER + "self_attn.q_norm.weight"),
        _same(_LAYER + "self_attn.k_norm.weight"),
        _same(_LAYER + "self_attn.o_proj.weight"),
        _same(_LAYER + "post_attention_layernorm.weight"),
        Entry(
            _LAYER + "mlp.gate_up_proj.weight",
            (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
            _gate_up_rows,
        ),
        _same(_LAYER + "mlp.down_proj.weight"),
        _same("model.norm.weight"),
        _same("lm_head.weight"),
    )
}


def from_hf(tensors: Mapping[str, Tensor], config: ModelConfig, where: str) -> dict[str, Tensor]:
    """Our tensors from those of a Hugging Face checkpoint; `where` names it in messages.

    Raises:
        UserError: a tensor is missing, is left over, or has another shape than `config` says.
    """
    tensors = dict(tensors)
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        # Some files store the tied matrix twice. That is fine as long as the two agree.
        head, embedding = tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight")
        if embedding is not None and not torch.equal(head, embedding):
            raise UserError(
                f"{where}: lm_head.weight differs from model.embed_tokens.weight although config.json ties them: "
                "set tie_word_embeddings to false there"
            )
    entries = list(_entries(config))
    expected = {name for entry in entries for name in entry.theirs}
    _require_same_names(tensors.keys(), expected, where)
    ours = {}
    for entry in entries:
        parts = [tensors[name] for name in entry.theirs]
        for name, part, rows in zip(entry.theirs, parts, entry.rows(config) if entry.rows else (), strict=False):
            if part.shape != (rows, config.hidden_size):
                raise UserError(
                    f"{where}: {name} has shape {list(part.shape)}, config.json says "
                    f"{[rows, config.hidden_size]}: {_MISMATCH}"
                )
        ours[entry.ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return ours


def to_hf(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The Hugging Face tensors of our model's state dict; parts of one of our tensors are views of it.

    Raises:
        UserError: a tensor is missing or left over.
    """
    entries = list(_entries(config))
    _require_same_names(tensors.keys(), {entry.ours for entry in entries}, "the model")
    theirs: dict[str, Tensor] = {}
    for entry in entries:
        tensor = tensors[entry.ours]
        parts = torch.split(tensor, list(entry.rows(config))) if entry.rows else (tensor,)
        theirs.update(zip(entry.theirs, parts, strict=True))
    return theirs


_MISMATCH = "weights and config.json do not belong together, fetch both again"


def _entries(config: ModelConfig) -> Iterator[Entry]:
    """The family's table with layers spelled out."""
    for entry in KEY_MAPS[config.model_type]:
        if entry.ours == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "{layer}" not in entry.ours:
            yield entry
            continue
        for layer in range(config.num_hidden_layers):
            ours = entry.ours.format(layer=layer)
            yield Entry(ours, tuple(name.format(layer=layer) for name in entry.theirs), entry.rows)


def _require_same_names(given: Collection[str], expected: Collection[str], where: str) -> None:
    given, expected = set(given), set(expected)
    for kind, names in (("lacks", expected - given), ("has unknown", given - expected)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{where} {kind} tensors {shown}: {_MISMATCH}")
