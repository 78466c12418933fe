"""Attention of whole rows as two plain products around a softmax, for bfloat16 on a CPU and compiled steps.

Grouped heads share one product with their key-value head, so keys and values are never repeated.

Shapes: B batch, T tokens, N query heads, K key-value heads, G = N / K heads a group, H head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """q [B, T, N, H], k and v [B, T, K, H], bias [B, 1, 1, T, T] added to the scores: [B, T, N, H]."""
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    q_rMH = (q * scale).view(B, 1, T, K, G, H).permute(0, 1, 3, 4, 2, 5).reshape(B * K, G * T, H)
    k_rHT = k.view(B, 1, T, K, H).permute(0, 1, 3, 4, 2).reshape(B * K, H, T)
    v_rTH = v.reshape(B, 1, T, K, H).transpose(2, 3).reshape(B * K, T, H)
    scores = torch.bmm(q_rMH, k_rHT).view(B, 1, N, T, T) + bias
    out_rMH = torch.bmm(scores.softmax(-1).view(B * K, G * T, T), v_rTH)
    return out_rMH.view(B, 1, K, G, T, H).permute(0, 1, 4, 2, 3, 5).reshape(B, T, N, H)
