"""Tensors in the formats of GGUF: expanded (`gguf_blocks` has the formulas), and packed in those that we write.

A block is a run of weights of one row. Each formula below is that of `quantize_row_*_ref` in
https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c, with the structures of ggml-common.h; products and sums
round one by one, as there, so that results agree in every bit.

Shapes: N blocks; a row of an array is a block's bytes, in the order of the structure's fields.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openbook.checkpoint.gguf_blocks import expanded
from openbook.checkpoint.gguf_io import FORMATS, BlockFormat
from openbook.core.errors import UserError

WRITABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Weights packed at a time: what is held beside the result stays within the processor's cache.
_CHUNK = 2**18


def dequantise(raw: Tensor, block_format: BlockFormat, dtype: torch.dtype | None = None) -> Tensor:
    """The weights in `raw`, uint8 [bytes], as [weights].

    Args:
        raw: on the CPU, or on the device "meta" for shape and dtype only.
        dtype: of the result; None: float32, or for F32, F16 and BF16 what is stored, as a view of `raw`.
    """
    if block_format.name in _PLAIN:
        stored = raw.view(_PLAIN[block_format.name])
        return stored if dtype is None else stored.to(dtype)
    shape = len(raw) // block_format.block_bytes, block_format.block_size
    out = torch.empty(shape, dtype=dtype or torch.float32, device=raw.device)
    if not raw.is_meta:
        for place, weights in expanded(raw.numpy(), block_format):
            out[place] = torch.from_numpy(weights)
    return out.flatten()


def quantise(weights: Tensor, block_format: BlockFormat, name: str) -> Tensor:
    """The bytes, uint8 [bytes], that store floats of any shape; rows are a multiple of the block size.

    Args:
        block_format: one of `WRITABLE`.
        name: of the tensor, for messages.

    Raises:
        UserError: a weight is not finite, or too large for the format.
    """
    flat = weights.detach().cpu().contiguous().flatten()
    if block_format.name in _PLAIN:
        stored = flat.to(_PLAIN[block_format.name])
        _require_finite(stored, flat, name, block_format)
        return stored.view(torch.uint8)
    blocks = flat.view(-1, block_format.block_size)
    out = torch.empty(len(blocks), block_format.block_bytes, dtype=torch.uint8)
    encode = _ENCODERS[block_format.name]
    step = _CHUNK // block_format.block_size
    for start in range(0, len(blocks), step):
        chunk = blocks[start : start + step].float()
        scale, codes = encode(chunk)
        _require_finite(scale, chunk, name, block_format)
        out[start : start + step, :2] = scale.view(torch.uint8)
        out[start : start + step, 2:] = codes
    return out.flatten()


def writable_format(name: str) -> BlockFormat:
    """The format of that name.

    Raises:
        UserError: it is not one that is written.
    """
    if name not in WRITABLE:
        raise UserError(f"the GGUF type {name!r} is not written, expected one of {', '.join(WRITABLE)}: choose another")
    return FORMATS[name]


def _require_finite(stored: Tensor, given: Tensor, name: str, block_format: BlockFormat) -> None:
    if stored.isfinite().all():
        return
    if given.isfinite().all():
        most = given.abs().amax().item()
        raise UserError(f"{name} has the weight {most:.6g}, too large for {block_format.name}: write BF16 or F32")
    raise UserError(f"{name} has a weight that is not a finite number: the model is damaged, fetch it again")


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where that is no finite number: the stored half float is then 0, so the codes do not matter."""
    inverse = 1 / scale
    return inverse.where(inverse.isfinite(), 0)


def _encode_q8_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """d = max |x| / 127, q = x / d rounded to nearest, halves away from zero."""
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    scaled = blocks * _inverse(scale)
    whole = scaled.abs().floor()
    whole += (scaled.abs() - whole) >= 0.5
    return scale.half(), whole.copysign(scaled).to(torch.int8).view(torch.uint8)


def _encode_q4_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """d = x / -8 for the x of largest magnitude (the first of equals), q = floor(x / d + 8.5), at most 15."""
    largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    scale = largest / -8
    codes = (blocks * _inverse(scale) + 8.5).clamp(max=15).to(torch.uint8)
    return scale.half(), codes[:, :16] | (codes[:, 16:] << 4)


_ENCODERS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"Q8_0": _encode_q8_0, "Q4_0": _encode_q4_0}
