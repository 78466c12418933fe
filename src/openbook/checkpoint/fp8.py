"""Files in FP8 squares: matrices beside experts are expanded as they are read, experts stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from openbook.core.errors import UserError
from openbook.models.config import FP8_BLOCK
from openbook.models.layers.packed import expand_fp8

FP8_SCALES = "_scale_inv"  # behind the name of the matrix that they belong to
_EXPERT = ".mlp.experts."


class ExpandedFp8(Mapping[str, Tensor]):
    """Tensors of a checkpoint without the scales of its FP8 matrices, which are expanded when they are asked for.

    Args:
        tensors: as the files have them.
        dtype: of what is expanded; None for float32.
        where: names the checkpoint in messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, where: str) -> None:
        self._tensors, self._dtype, self._where = tensors, dtype or torch.float32, where
        self._names = [name for name in tensors if not name.endswith(FP8_SCALES) or _EXPERT in name]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if tensor.dtype != torch.float8_e4m3fn or _EXPERT in name:
            return tensor
        scales = self._tensors.get(name + FP8_SCALES)
        expected = [-(-size // FP8_BLOCK) for size in tensor.shape]
        if scales is None or list(scales.shape) != expected:
            given = "no scales" if scales is None else f"scales of shape {list(scales.shape)}"
            raise UserError(
                f"{self._where}: {name} is FP8 with {given}, expected {name}{FP8_SCALES} of shape {expected}: "
                "fetch the files again"
            )
        by_row = scales.float().repeat_interleave(FP8_BLOCK, dim=0)[: len(tensor)]
        return expand_fp8(tensor, by_row, self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
