"""Weights that stay in memory as narrow as their file has them, and are expanded as they are used.

What is packed are buffers, in the layout of the checkpoint, so that saving gives the same bytes again; they take no
gradient. `Ops.grouped_linear` asks for the rows of one matrix at a time. A format is one subclass of `PackedMatrices`.

Shapes: E matrices [O, I].
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn

from openbook.models.config import FP8_BLOCK, MXFP4_BLOCK
from openbook.models.layers.moe import Experts

# Expanded rows that are held at a time on CPU: they stay in its cache between expansion and product.
_PIECE_BYTES = 2**20
# Of which they are a multiple: what products take at once, so that whole matrices are summed in the same order.
_PIECE_ROWS = 64


class PackedMatrices(nn.Module):
    """E matrices [O, I] in a narrow format; see `openbook.ops.base.PackedMatrices`."""

    def __init__(self, num_rows: int, num_columns: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.num_columns = num_columns

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it is."""

    @abstractmethod
    def expand(self, index: int, rows: slice, dtype: torch.dtype) -> Tensor:
        """The given rows of matrix `index`, a new tensor [rows, I] in `dtype`."""

    def pieces(self, index: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """See `openbook.ops.base.PackedMatrices.pieces`."""
        step = self.num_rows
        if self.device.type == "cpu":
            rows = _PIECE_BYTES // (self.num_columns * dtype.itemsize)
            step = max(rows // _PIECE_ROWS, 1) * _PIECE_ROWS
        for start in range(0, self.num_rows, step):
            yield self.expand(index, slice(start, min(start + step, self.num_rows)), dtype)


class Mxfp4Matrices(PackedMatrices):
    """MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 neighbours in a row, each FP4 E2M1, with one scale E8M0.

    blocks: uint8 [E, O, I / 32, 16], in each byte two neighbours, the first one in its low half.
    scales: uint8 [E, O, I / 32], the exponent of two plus 127; 255 is NaN.
    """

    blocks: Tensor
    scales: Tensor

    def __init__(self, num_matrices: int, num_rows: int, num_columns: int) -> None:
        super().__init__(num_rows, num_columns)
        shape = (num_matrices, num_rows, num_columns // MXFP4_BLOCK)
        self.register_buffer("blocks", torch.empty((*shape, MXFP4_BLOCK // 2), dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(shape, dtype=torch.uint8))

    @property
    def device(self) -> torch.device:
        """See `PackedMatrices.device`."""
        return self.blocks.device

    def expand(self, index: int, rows: slice, dtype: torch.dtype) -> Tensor:
        """See `PackedMatrices.expand`."""
        return expand_mxfp4(self.blocks[index, rows], self.scales[index, rows], dtype)


def expand_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks uint8 [..., G, 16] and scales uint8 [..., G] to weights [..., 32 G] in `dtype`.

    Every one is exact in bfloat16 as in float32, up to where the range of both ends: bfloat16 has the exponents of E8M0
    and more digits than E2M1.
    """
    fours, powers = _mxfp4_tables(blocks.device)
    wide = torch.float32 if dtype == torch.float16 else dtype  # float16 has fewer exponents
    # Two bytes, four weights, at a time: the table is small enough for the cache, and steps cost more than bytes.
    places = blocks.contiguous().view(torch.int16).flatten().int().add_(2**15)
    weights = fours.index_select(0, places).view(torch.bfloat16).to(wide).view(-1, MXFP4_BLOCK)
    weights.mul_(powers.index_select(0, scales.flatten().int()).to(wide)[:, None])
    return weights.view(*scales.shape[:-1], -1).to(dtype)


@cache
@torch.inference_mode(mode=False)
def _mxfp4_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The four weights of each int16, from the least on, as one int64; the power of two of each scale, bfloat16."""
    # Section 5.3.3: sign, two bits of exponent with bias 1, one of mantissa.
    codes = torch.arange(16)
    exponents, mantissas = codes >> 1 & 3, codes & 1
    magnitudes = torch.where(exponents == 0, mantissas / 2, 2.0 ** (exponents - 1) * (1 + mantissas / 2))
    values = torch.where(codes < 8, magnitudes, -magnitudes)
    stored = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.uint8)
    fours = torch.stack([values[stored.int() & 15], values[stored.int() >> 4]], -1).view(-1, 4)
    # Section 5.4.1.
    powers = 2.0 ** (torch.arange(256, dtype=torch.float64) - 127)
    powers[255] = torch.nan
    return fours.to(torch.bfloat16).view(torch.int64).flatten().to(device), powers.to(torch.bfloat16).to(device)


class Fp8Matrices(PackedMatrices):
    """FP8 E4M3 with one scale for each square of 128 by 128 weights (DeepSeek V3, arXiv 2412.19437, section 3.3).

    weight: float8_e4m3fn [E, O, I]. scales: float32 [E, p ceil(O / p / 128), ceil(I / 128)], which multiply. A matrix
    may be of p equal parts, one below the other, each with squares of its own.
    """

    weight: Tensor
    scales: Tensor

    def __init__(self, num_matrices: int, num_rows: int, num_columns: int, num_parts: int = 1) -> None:
        super().__init__(num_rows, num_columns)
        self._part_rows = num_rows // num_parts
        self._part_blocks = -(-self._part_rows // FP8_BLOCK)
        shape = (num_matrices, num_parts * self._part_blocks, -(-num_columns // FP8_BLOCK))
        self.register_buffer("weight", torch.empty((num_matrices, num_rows, num_columns), dtype=torch.float8_e4m3fn))
        self.register_buffer("scales", torch.empty(shape, dtype=torch.float32))

    @property
    def device(self) -> torch.device:
        """See `PackedMatrices.device`."""
        return self.weight.device

    def expand(self, index: int, rows: slice, dtype: torch.dtype) -> Tensor:
        """See `PackedMatrices.expand`."""
        numbers = torch.arange(rows.start, rows.stop, device=self.device)
        blocks = numbers // self._part_rows * self._part_blocks + numbers % self._part_rows // FP8_BLOCK
        return expand_fp8(self.weight[index, rows], self.scales[index].index_select(0, blocks), dtype)


def expand_fp8(weight: Tensor, row_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """weight float8_e4m3fn [R, I] times row_scales float32 [R, ceil(I / 128)]: [R, I] in `dtype`, rounded once."""
    num_columns = weight.shape[1]
    scales = row_scales.repeat_interleave(FP8_BLOCK, dim=1)[:, :num_columns]
    return (weight.float() * scales).to(dtype)


class Fp8Experts(Experts):
    """Experts whose matrices are FP8; gate and up have squares of their own."""

    def make_weights(self) -> None:
        """See `Experts.make_weights`."""
        for name, shape in self.shapes.items():
            setattr(self, name, Fp8Matrices(self.num_experts, *shape, num_parts=2 if name == "gate_up_proj" else 1))


class Mxfp4Experts(Experts):
    """Experts whose matrices are MXFP4; their sizes are multiples of 32."""

    def make_weights(self) -> None:
        """See `Experts.make_weights`."""
        for name, shape in self.shapes.items():
            setattr(self, name, Mxfp4Matrices(self.num_experts, *shape))
