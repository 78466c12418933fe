"""Lays a model's matrices out for decoding, once it begins to decode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openbook.models.base import CausalModel
from openbook.models.layers.linear import Linear
from openbook.models.layers.moe import Experts
from openbook.ops.blocked import BlockedMatrices, can_be_blocked, to_blocked


@torch.no_grad()
def lay_out_for_decoding(model: CausalModel) -> None:
    """Give every matrix that only products read the layout that is fastest for few rows, in place.

    A matrix that is read in another way (an embedding, which may be the output matrix too) stays, and gets a copy.
    """
    if model.ops.is_exact:  # its products have one order and a layout of their own
        return
    for module in model.modules():
        if isinstance(module, Linear) and module.is_only_multiplied and can_be_blocked(module.weight):
            module.weight = nn.Parameter(to_blocked(module.weight), requires_grad=False)
        elif isinstance(module, Experts):
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(module, name)
                if isinstance(weight, Tensor) and can_be_blocked(weight):
                    delattr(module, name)
                    setattr(module, name, BlockedMatrices(weight))
    head = model.output_weight
    if can_be_blocked(head):
        model.blocked_output_weight = to_blocked(head)
