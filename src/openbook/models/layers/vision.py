"""The vision tower of Qwen 2 VL (arXiv 2409.12191): a transformer over image patches, each image by itself.

Shapes: P patches of an image, E embed_dim, N heads, H head_dim, m spatial_merge_size, D hidden_size of the decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openbook.models.config import Grid
from openbook.models.configs.qwen2_vl import VisionConfig
from openbook.models.layers.linear import Linear
from openbook.models.layers.norm import LayerNorm
from openbook.models.layers.rope import rope_tables
from openbook.ops.base import Ops

# Not in any configuration file: the reference implementation has it in its code.
_NORM_EPS = 1e-6


class VisionTower(nn.Module):
    """Patches to one feature vector for each square of m x m patches; named `visual` in a checkpoint."""

    def __init__(self, config: VisionConfig, ops: Ops) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        # A convolution whose step is its own size is a product.
        self.patch_embed = Linear(config.patch_dim, config.embed_dim, ops)
        self.layers = nn.ModuleList(VisionLayer(config, ops) for _ in range(config.depth))
        self.merger = PatchMerger(config, ops)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        """patches [P, patch_dim] of an image to [P / m^2, D].

        Args:
            patches: in squares of m x m, row by row inside and outside.
            grid: multiples of m.
        """
        x_PE = self.patch_embed(patches)
        rope = self._rope(grid, x_PE)
        for layer in self.layers:
            x_PE = layer(x_PE, rope)
        merged: Tensor = self.merger(x_PE)
        return merged

    def _rope(self, grid: Grid, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [1, P, H / 2]: the first half of the pairs turns with a patch's row, the second with its column.

        Both halves have the frequencies of a rotary embedding of H / 2 features.
        """
        config = self.config
        places_P2 = patch_places(grid, config.spatial_merge_size).to(like.device)
        half = config.embed_dim // config.num_heads // 2
        cos_P2J, sin_P2J = rope_tables(self.ops, places_P2, half, config.rope_theta, like.dtype)
        return cos_P2J.flatten(1)[None], sin_P2J.flatten(1)[None]


def patch_places(grid: Grid, merge: int) -> Tensor:
    """Row and column of an image's patches in the order that `VisionTower.forward` documents, int64 [P, 2]."""
    rows, columns = grid
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
    squares = places.view(rows // merge, merge, columns // merge, merge, 2)
    return squares.transpose(1, 2).reshape(-1, 2)


class VisionLayer(nn.Module):
    """Attention among all patches and a feed-forward, each on the normalised stream and added to it."""

    def __init__(self, config: VisionConfig, ops: Ops) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.embed_dim, _NORM_EPS, ops)
        self.attention = VisionAttention(config, ops)
        self.mlp_norm = LayerNorm(config.embed_dim, _NORM_EPS, ops)
        self.mlp = VisionMLP(config, ops)

    def forward(self, x_PE: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x [P, E], rope tables [1, P, H / 2], to [P, E]."""
        x_PE = x_PE + self.attention(self.attention_norm(x_PE), rope)
        out: Tensor = x_PE + self.mlp(self.mlp_norm(x_PE))
        return out


class VisionAttention(nn.Module):
    """Multi-head attention in which every patch sees every other."""

    def __init__(self, config: VisionConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.num_heads = config.num_heads
        self.qkv_proj = Linear(config.embed_dim, 3 * config.embed_dim, ops, has_bias=True)
        self.o_proj = Linear(config.embed_dim, config.embed_dim, ops, has_bias=True)

    def forward(self, x_PE: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """As `VisionLayer.forward`."""
        qkv = self.qkv_proj(x_PE).view(1, len(x_PE), 3, self.num_heads, -1)
        q_1PNH, k_1PNH, v_1PNH = qkv.unbind(2)
        q_1PNH, k_1PNH = self.ops.rope(q_1PNH, *rope), self.ops.rope(k_1PNH, *rope)
        out_1PNH = self.ops.attention(q_1PNH, k_1PNH, v_1PNH, None, q_1PNH.shape[-1] ** -0.5)
        out: Tensor = self.o_proj(out_1PNH.reshape(x_PE.shape))
        return out


class VisionMLP(nn.Module):
    """Two matrices with x sigmoid(1.702 x) between."""

    def __init__(self, config: VisionConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.up_proj = Linear(config.embed_dim, config.mlp_ratio * config.embed_dim, ops, has_bias=True)
        self.down_proj = Linear(config.mlp_ratio * config.embed_dim, config.embed_dim, ops, has_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [P, E] to the same shape."""
        out: Tensor = self.down_proj(self.ops.gelu_sigmoid(self.up_proj(x)))
        return out


class PatchMerger(nn.Module):
    """Squares of m x m patches, normalised, to features of the decoder by two matrices with GELU between."""

    def __init__(self, config: VisionConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.merged_size = config.spatial_merge_size**2 * config.embed_dim
        self.norm = LayerNorm(config.embed_dim, _NORM_EPS, ops)
        self.up_proj = Linear(self.merged_size, self.merged_size, ops, has_bias=True)
        self.down_proj = Linear(self.merged_size, config.hidden_size, ops, has_bias=True)

    def forward(self, x_PE: Tensor) -> Tensor:
        """x [P, E], the patches of a square one after the other, to [P / m^2, D]."""
        squares = self.norm(x_PE).view(-1, self.merged_size)
        out: Tensor = self.down_proj(self.ops.gelu(self.up_proj(squares)))
        return out
