"""Rotary position embedding tables (arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position / theta^(2j / head_dim), computed in float32: each [B, T, head_dim / 2] in `dtype`.

    Args:
        positions: int64 [B, T].
    """
    exponents_J = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles_BTJ = positions[..., None].float() * (1.0 / theta**exponents_J)
    return angles_BTJ.cos().to(dtype), angles_BTJ.sin().to(dtype)
