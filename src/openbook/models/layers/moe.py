"""Mixture of experts: many feed-forward layers, of which a router chooses a few for each token (arXiv 1701.06538).

Shapes: M tokens, E experts, k chosen of them, R = M k rows of tokens sorted by expert, D hidden_size,
I moe_intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from openbook.models.layers.linear import Linear
from openbook.ops.base import Matrices, Ops

# From a product [R, 2 I], gate and up as the family arranges them, to [R, I].
Activation = Callable[[Tensor], Tensor]


class Experts(nn.Module):
    """Feed-forward layers of one shape; a token goes through those that were chosen for it.

    Only the matrices of chosen experts are read, one at a time. A subclass may keep them packed (see `packed.py`).

    Args:
        activation: what stands between the two products; None for SwiGLU, gate in the first I features.
        has_bias: both products add a bias, `gate_up_proj_bias` [E, 2 I] and `down_proj_bias` [E, D].
    """

    gate_up_proj: Matrices
    down_proj: Matrices

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        ops: Ops,
        *,
        activation: Activation | None = None,
        has_bias: bool = False,
    ) -> None:
        super().__init__()
        self.ops = ops
        self.activation = activation or ops.silu_mul
        self.num_experts = num_experts
        self.shapes = {
            "gate_up_proj": (2 * intermediate_size, hidden_size),
            "down_proj": (hidden_size, intermediate_size),
        }
        self.make_weights()
        for name, (rows, _) in self.shapes.items():
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(num_experts, rows)) if has_bias else None)

    def make_weights(self) -> None:
        """Make `gate_up_proj` and `down_proj`, uninitialised."""
        for name, shape in self.shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(self.num_experts, *shape)))

    def forward(self, x_MD: Tensor, chosen_Mk: Tensor, weights_Mk: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' results.

        Args:
            x_MD: tokens [M, D].
            chosen_Mk: int64 [M, k], experts from 0.
            weights_Mk: [M, k], in the dtype of the tokens.

        Returns:
            [M, D].
        """
        M, k = chosen_Mk.shape
        experts_R, order_R = chosen_Mk.flatten().sort(stable=True)
        ends_E = torch.searchsorted(experts_R, torch.arange(self.num_experts, device=x_MD.device), right=True)
        rows_RD = x_MD.index_select(0, order_R // k)
        inner_RI = self.activation(self._product("gate_up_proj", rows_RD, experts_R, ends_E))
        outer_RD = self._product("down_proj", inner_RI, experts_R, ends_E)
        # Back into the order of tokens: row `order_R[i]` is what the sorted row i was made from.
        back_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(M * k, device=x_MD.device))
        return self.ops.weighted_sum(self.ops.take(outer_RD, back_R).view(M, k, x_MD.shape[1]), weights_Mk)

    def _product(self, name: str, x: Tensor, experts_R: Tensor, ends_E: Tensor) -> Tensor:
        product = self.ops.grouped_linear(x, getattr(self, name), ends_E)
        bias: Tensor | None = getattr(self, f"{name}_bias")
        return product if bias is None else product + bias.index_select(0, experts_R)


class SoftmaxRouter(nn.Module):
    """The most probable experts of a softmax over all.

    Args:
        is_renormalised: the weights of the chosen are divided by their sum.
    """

    def __init__(self, hidden_size: int, num_experts: int, num_chosen: int, ops: Ops, *, is_renormalised: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.ops = ops
        self.num_chosen = num_chosen
        self.is_renormalised = is_renormalised

    def forward(self, x_MD: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, D] to the experts, int64 [M, k], and their weights, [M, k] in the dtype of x."""
        probabilities_ME = self.ops.softmax(self.ops.linear(x_MD, self.weight))
        weights_Mk, chosen_Mk = self.ops.top_k(probabilities_ME, self.num_chosen)
        if self.is_renormalised:
            weights_Mk = self.ops.shares(weights_Mk)
        return chosen_Mk, weights_Mk.to(x_MD.dtype)


class SparseMLP(nn.Module):
    """Router and experts, and beside them what every token goes through.

    Args:
        gate: called with [M, D], gives the chosen experts int64 [M, k] and their weights [M, k].
        shared_expert: a feed-forward layer for every token; None for none.
        shared_expert_gate: one score a token; its sigmoid multiplies what the shared expert gives. None for 1.
    """

    def __init__(
        self,
        ops: Ops,
        gate: nn.Module,
        experts: Experts,
        shared_expert: nn.Module | None = None,
        shared_expert_gate: Linear | None = None,
    ) -> None:
        super().__init__()
        self.ops = ops
        self.gate = gate
        self.experts = experts
        self.shared_expert = shared_expert
        self.shared_expert_gate = shared_expert_gate

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] to the same shape."""
        x_MD = x.reshape(-1, x.shape[-1])
        out: Tensor = self.experts(x_MD, *self.gate(x_MD))
        if self.shared_expert is not None:
            shared = self.shared_expert(x_MD)
            if self.shared_expert_gate is not None:
                shared = self.ops.scale_rows(shared, self.ops.sigmoid(self.shared_expert_gate(x_MD)))
            out = out + shared
        return out.view(x.shape)
