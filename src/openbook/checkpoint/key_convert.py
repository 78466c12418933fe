"""Tensors through a family's table: from a Hugging Face checkpoint to our model, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from openbook.checkpoint.key_map import Entry, KeyMap, matched, require_same_names, spell_out, unfitting
from openbook.models.config import ModelConfig

# What weights are unless they are packed.
PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def from_hf(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    table: KeyMap,
    where: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Our tensors from those of a Hugging Face checkpoint; `where` names it in messages.

    `tensors` may read its values when asked: each is asked for once, and not kept.

    Args:
        dtype: of the result; packed tensors stay as they are. None: as stored.
        device: of the result; None: where each tensor is.

    Raises:
        UserError: a tensor is missing, is left over, or has another shape than `config` says.
    """
    ours = {}
    for entry, read in matched(tensors, config, table, where):
        parts = read()
        try:
            ours[entry.ours] = _join(entry, parts, config, torch.float32 if entry.is_float32 else dtype, device)
        except RuntimeError as error:
            raise unfitting(entry, parts, where) from error
    return ours


def to_hf(tensors: Mapping[str, Tensor], config: ModelConfig, table: KeyMap) -> dict[str, Tensor]:
    """The Hugging Face tensors of our model's state dict; parts of one of our tensors are views of it.

    Raises:
        UserError: a tensor is missing or left over.
    """
    entries = list(spell_out(table, config))
    require_same_names(tensors.keys(), {entry.ours for entry in entries}, "the model")
    theirs: dict[str, Tensor] = {}
    for entry in entries:
        theirs.update(zip(entry.theirs, _split(entry, tensors[entry.ours], config), strict=True))
    return theirs


def _join(
    entry: Entry,
    parts: list[Tensor],
    config: ModelConfig,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Tensor:
    if entry.join is not None or len(parts) == 1:
        whole = entry.join(parts, config).contiguous() if entry.join is not None else parts[0]
        return whole.to(device=device, dtype=dtype if whole.dtype in PLAIN_DTYPES else None)
    if dtype is None:
        return torch.cat(parts).to(device)
    # Each part is read, converted and put into place in one pass.
    rows = [len(part) for part in parts]
    whole = torch.empty((sum(rows), *parts[0].shape[1:]), dtype=dtype, device=device)
    for place, part in zip(torch.split(whole, rows), parts, strict=True):
        if place.shape != part.shape:  # copy_ would repeat it
            raise RuntimeError("the parts have different widths")
        place.copy_(part)
    return whole


def _split(entry: Entry, tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
    if entry.split is not None:
        return entry.split(tensor, config)
    return torch.split(tensor, list(entry.rows(config))) if entry.rows else (tensor,)
