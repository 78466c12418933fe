"""Matrices: a projection and an embedding, their arithmetic through Ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from openbook.ops.base import Ops

if TYPE_CHECKING:
    from openbook.models.layers.lora import LowRankUpdates


class Linear(nn.Module):
    """x W^T + b. Weights are uninitialised: `init_weights` or a checkpoint fills them.

    (torch.nn.Linear draws random numbers when built; on the meta device that alone imports the compiler, one second.)

    is_only_multiplied: nothing but `forward` reads the weight, so a runner may lay it out in its own way.
    low_rank: what loaded adapters add, see `openbook.models.layers.lora`; None if none adds anything.
    """

    is_only_multiplied = True

    def __init__(self, in_features: int, out_features: int, ops: Ops, *, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if has_bias else None
        self.ops = ops
        self.low_rank: LowRankUpdates | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] to [..., out_features]."""
        out = self.ops.linear(x, self.weight, self.bias)
        return out if self.low_rank is None else self.low_rank.add_to(out, x)


class Embedding(nn.Module):
    """Rows of a table [num_embeddings, size]. The weight is uninitialised, as in `Linear`."""

    def __init__(self, num_embeddings: int, size: int, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, size))
        self.ops = ops

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] to [..., size]."""
        return self.ops.embedding(ids, self.weight)
