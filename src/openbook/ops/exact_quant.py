"""Products with quantised weights in the exact profile: what native/quant.h specifies, from Python and without torch.

Weights stay in blocks of 32 as GGUF stores them, packed once for reading in order. Activations are rounded to int8,
products are summed in int32, and scales are applied block after block: the same bits on every CPU, thread count and
batch.

Shapes: M rows, K features in, N features out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook.core.errors import UserError
from openbook.ops import _native

BLOCK = 32  # weights along K that share a scale
KIND_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}  # of a block in GGUF
LAYOUT: int = _native.QUANT_LAYOUT  # number of the packed form; another number, other bytes


class QuantMatrix:
    """A matrix [N, K] of one of `KIND_BYTES`; it does not change once it is made."""

    def __init__(self, native: Any) -> None:
        self.native = native
        self.kind: str = native.kind
        self.shape: tuple[int, int] = (native.num_rows, native.num_columns)

    @classmethod
    def from_gguf(cls, parts: Sequence[NDArray[np.uint8]], kind: str, num_columns: int) -> QuantMatrix:
        """The rows of all parts below each other (q, k and v; gate and up).

        Args:
            parts: each uint8, the bytes of whole rows as GGUF stores them, in any shape.
            kind: a key of `KIND_BYTES`.
            num_columns: K, a multiple of 32.

        Raises:
            UserError: there is no such kind, or the bytes are no whole rows.
        """
        row_bytes = _row_bytes(kind, num_columns)
        rows = []
        for part in parts:
            if part.dtype != np.uint8 or part.size == 0 or part.size % row_bytes:
                raise UserError(
                    f"{part.size} values of {part.dtype} are no rows of {num_columns} weights in {kind}: expected "
                    f"uint8 bytes, {row_bytes} a row; check the file"
                )
            rows.append(np.ascontiguousarray(part).reshape(-1, row_bytes))
        if not rows:
            raise UserError("a quantised matrix was given no rows, expected at least one part; check the file")
        native = _native.QuantWeight(kind, sum(map(len, rows)), num_columns)
        first = 0
        for part in rows:
            native.set_rows(first, part)
            first += len(part)
        return cls(native)

    @classmethod
    def from_packed(cls, packed: NDArray[np.uint8], kind: str, shape: tuple[int, int]) -> QuantMatrix:
        """What `packed` was of a matrix of this kind and shape, under the same `LAYOUT`; it is kept, not copied.

        Raises:
            UserError: there is no such kind, or the bytes are not as many as the shape takes, or do not start at a
                multiple of 64.
        """
        num_rows, num_columns = shape
        _row_bytes(kind, num_columns)
        expected = packed_bytes(kind, shape)
        if packed.dtype != np.uint8 or packed.shape != (expected,) or num_rows < 1:
            raise UserError(
                f"a packed matrix in {kind} of shape {list(shape)} has {expected} bytes, not {list(packed.shape)} of "
                f"{packed.dtype}: pack the model again"
            )
        if packed.ctypes.data % 64:
            raise UserError("a packed matrix starts within 64 bytes, expected a multiple: pack the model again")
        return cls(_native.QuantWeight.from_bytes(kind, num_rows, num_columns, packed))

    @property
    def packed(self) -> NDArray[np.uint8]:
        """The bytes as they lie in memory, uint8 [bytes], read-only; not copied."""
        array: NDArray[np.uint8] = self.native.packed()
        return array

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows at ids [M] as floats, [M, K]: the values that GGUF defines.

        Raises:
            UserError: an id that the matrix has no row for.
        """
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.shape[0]:
            raise UserError(
                f"ids are from {int(ids.min())} to {int(ids.max())}, expected 0 to {self.shape[0] - 1}; check the "
                "tokenizer"
            )
        out = np.empty((len(ids), self.shape[1]), np.float32)
        _native.quant_rows(self.native, np.ascontiguousarray(ids, np.int64), out)
        return out

    def linear(self, x: NDArray[np.float32], bias: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """x float32 [M, K], rounded to int8 in blocks of 32, times this matrix transposed, plus bias [N]: [M, N].

        Raises:
            UserError: another dtype, or shapes that do not fit.
        """
        num_rows, num_columns = self.shape
        if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] != num_columns:
            raise UserError(f"x is {x.dtype} of shape {list(x.shape)}, expected float32 [M, {num_columns}]; correct it")
        if bias is not None and (bias.dtype != np.float32 or bias.shape != (num_rows,)):
            raise UserError(f"bias is {bias.dtype} {list(bias.shape)}, expected float32 [{num_rows}]; correct it")
        out = np.empty((len(x), num_rows), np.float32)
        _native.quant_linear(
            np.ascontiguousarray(x), self.native, None if bias is None else np.ascontiguousarray(bias), out
        )
        return out


def packed_bytes(kind: str, shape: tuple[int, int]) -> int:
    """Bytes of a packed matrix [N, K]: rows are filled up to a multiple of 32.

    Raises:
        UserError: there is no such kind, or the columns are no multiple of 32.
    """
    return -(-shape[0] // BLOCK) * BLOCK * _row_bytes(kind, shape[1])


def _row_bytes(kind: str, num_columns: int) -> int:
    if kind not in KIND_BYTES:
        raise UserError(f"weights of kind {kind!r} are not multiplied as they are, expected {', '.join(KIND_BYTES)}")
    if num_columns < 1 or num_columns % BLOCK:
        raise UserError(f"rows have {num_columns} weights, expected a multiple of {BLOCK} for {kind}; check the file")
    return num_columns // BLOCK * KIND_BYTES[kind]
