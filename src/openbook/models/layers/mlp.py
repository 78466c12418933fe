"""Feed-forward layers."""

from __future__ import annotations

from torch import Tensor, nn

from openbook.models.config import ModelConfig
from openbook.ops.base import Ops


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202); gate and up are one matrix, gate's rows first."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, hidden_size] to the same shape."""
        gate, up = self.ops.linear(x, self.gate_up_proj.weight).chunk(2, dim=-1)
        return self.ops.linear(self.ops.silu_mul(gate, up), self.down_proj.weight)
