"""The block formats of GGUF, read: stored bytes to float32, in numpy.

A block is a run of weights of one row. Each formula below is that of `dequantize_row_*` in
https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c, with the structures of ggml-common.h; products and sums
round one by one, as there, so that results agree in every bit.

Shapes: N blocks; a row of an array is a block's bytes, in the order of the structure's fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from openbook.checkpoint.gguf_io import BlockFormat, Bytes

Floats = npt.NDArray[np.float32]

# Weights expanded at a time: what is held beside the result stays within the processor's cache.
_CHUNK = 2**16


def expanded(raw: Bytes, block_format: BlockFormat) -> Iterator[tuple[slice, Floats]]:
    """The weights in `raw`, uint8 [bytes] of a format in blocks, some blocks after the other.

    Returns:
        places of blocks, and what is in them: float32 [blocks, block_size].
    """
    blocks = raw.reshape(-1, block_format.block_bytes)
    decode = _DECODERS[block_format.name]
    step = _CHUNK // block_format.block_size
    for start in range(0, len(blocks), step):
        place = slice(start, start + step)
        with np.errstate(all="ignore"):  # damaged scales: what follows from them is checked where it is used
            weights = decode(blocks[place])
        yield place, weights


def expand(raw: Bytes, block_format: BlockFormat) -> Floats:
    """All the weights in `raw`, uint8 [bytes] of a format in blocks, as float32 [weights]."""
    num_blocks = len(raw) // block_format.block_bytes
    out = np.empty((num_blocks, block_format.block_size), dtype=np.float32)
    for place, weights in expanded(raw, block_format):
        out[place] = weights
    return out.reshape(-1)


def _half(blocks: Bytes, start: int) -> Floats:
    """The half float at byte `start` of each block, as float32 [N, 1]."""
    return blocks[:, start : start + 2].view(np.float16).astype(np.float32)


def _floats(codes: npt.NDArray[np.generic]) -> Floats:
    return codes.astype(np.float32)


def _nibbles(packed: Bytes, run: int) -> Bytes:
    """4-bit codes: of each `run` bytes first all low halves, then all high ones. [N, bytes] to [N, 2 bytes]."""
    runs = packed.reshape(len(packed), -1, run)
    codes = np.empty((*runs.shape[:2], 2, run), dtype=np.uint8)
    np.bitwise_and(runs, 15, out=codes[:, :, 0])
    np.right_shift(runs, 4, out=codes[:, :, 1])
    return codes.reshape(len(packed), -1)


def _fifth_bits(blocks: Bytes, start: int) -> Bytes:
    """Bit i of the 32-bit number at byte `start` is weight i's fifth: uint8 [N, 32], 0 or 16."""
    bits = (blocks[:, start : start + 4, None] >> np.arange(8, dtype=np.uint8)) & np.uint8(1)
    return bits.reshape(len(blocks), -1) << np.uint8(4)


def _decode_q4_0(blocks: Bytes) -> Floats:
    """d (q - 8); fields d, 16 bytes of nibbles."""
    weights = _floats(_nibbles(blocks[:, 2:], 16))
    weights -= 8
    weights *= _half(blocks, 0)
    return weights


def _decode_q4_1(blocks: Bytes) -> Floats:
    """d q + m; fields d, m, 16 bytes of nibbles."""
    weights = _floats(_nibbles(blocks[:, 4:], 16))
    weights *= _half(blocks, 0)
    weights += _half(blocks, 2)
    return weights


def _decode_q5_0(blocks: Bytes) -> Floats:
    """d (q - 16); fields d, 4 bytes of fifth bits, 16 bytes of nibbles."""
    codes = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks, 2)
    weights = _floats(codes)
    weights -= 16
    weights *= _half(blocks, 0)
    return weights


def _decode_q5_1(blocks: Bytes) -> Floats:
    """d q + m; fields d, m, 4 bytes of fifth bits, 16 bytes of nibbles."""
    codes = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks, 4)
    weights = _floats(codes)
    weights *= _half(blocks, 0)
    weights += _half(blocks, 2)
    return weights


def _decode_q8_0(blocks: Bytes) -> Floats:
    """d q; fields d, 32 signed bytes."""
    weights = _floats(blocks[:, 2:].view(np.int8))
    weights *= _half(blocks, 0)
    return weights


def _scales_and_minima(blocks: Bytes) -> tuple[Floats, Floats]:
    """d times the 6-bit scale and dmin times the 6-bit minimum of each of a K block's 8 runs, float32 [N, 8, 1].

    Fields d, dmin, 12 bytes: the low 6 bits of bytes 0-3 are scales 0-3, of bytes 4-7 minima 0-3. Bytes 8-11 hold the
    low halves of scales 4-7 in their low halves and of minima 4-7 in their high ones; the upper two bits of bytes 0-7
    are those of scales 4-7 and minima 4-7.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((first & 63, (third & 15) | ((first >> 6) << 4)), axis=1)
    minima = np.concatenate((second & 63, (third >> 4) | ((second >> 6) << 4)), axis=1)
    return (_half(blocks, 0) * _floats(scales))[:, :, None], (_half(blocks, 2) * _floats(minima))[:, :, None]


def _decode_q4_k(blocks: Bytes) -> Floats:
    """scale q - minimum in 8 runs of 32; after the scales 128 bytes of nibbles."""
    scales, minima = _scales_and_minima(blocks)
    codes = _nibbles(blocks[:, 16:], 32).reshape(-1, 8, 32)
    return (scales * _floats(codes) - minima).reshape(len(blocks), -1)


def _decode_q5_k(blocks: Bytes) -> Floats:
    """As Q4_K; before the nibbles 32 bytes whose bit r is the fifth of that place in run r."""
    scales, minima = _scales_and_minima(blocks)
    fifth = ((blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1) << 4
    codes = _nibbles(blocks[:, 48:], 32).reshape(-1, 8, 32) | fifth
    return (scales * _floats(codes) - minima).reshape(len(blocks), -1)


def _decode_q6_k(blocks: Bytes) -> Floats:
    """d scale (q - 32) in 16 runs of 16; fields 128 bytes of low halves, 64 bytes of upper bit pairs, 16 scales, d.

    Each half of the block has 64 bytes of nibbles and 32 bytes of pairs: pair r of a byte belongs to run r of 32.
    """
    low = _nibbles(blocks[:, :128], 64).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    codes = _floats((low | ((high & 3) << 4)).reshape(-1, 16, 16)) - 32
    scales = _half(blocks, 208) * _floats(blocks[:, 192:208].view(np.int8))
    return (scales[:, :, None] * codes).reshape(len(blocks), -1)


# FP4 E2M1 (OCP Microscaling Formats 1.0, section 5.3.3): sign, two bits of exponent, one of mantissa. llama.cpp writes
# a zero for the code of minus zero.
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def _decode_mxfp4(blocks: Bytes) -> Floats:
    """2^(e - 127) times an FP4 value; fields e, 16 bytes of nibbles."""
    # Doubled values times half the scale, as 2^127 times 6 is finite only so; e = 0 and 1 are subnormal halves.
    exponents = blocks[:, :1].astype(np.int32)
    bits = np.where(exponents < 2, 0x00200000 << np.minimum(exponents, 1), (exponents - 1) << 23).astype(np.int32)
    return bits.view(np.float32) * (2 * _FP4)[_nibbles(blocks[:, 1:], 16)]


_DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "Q4_0": _decode_q4_0,
    "Q4_1": _decode_q4_1,
    "Q5_0": _decode_q5_0,
    "Q5_1": _decode_q5_1,
    "Q8_0": _decode_q8_0,
    "Q4_K": _decode_q4_k,
    "Q5_K": _decode_q5_k,
    "Q6_K": _decode_q6_k,
    "MXFP4": _decode_mxfp4,
}
