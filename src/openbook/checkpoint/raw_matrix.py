"""Weights as a file stores them, in numpy: for what computes on them in that form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from openbook.checkpoint.gguf_blocks import Floats, expand
from openbook.checkpoint.gguf_io import FORMATS, Bytes

Storage = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"]

_PLAIN: dict[str, tuple[Storage, str]] = {"F32": ("f32", "<f4"), "F16": ("f16", "<f2"), "BF16": ("bf16", "<u2")}
_BLOCKS: dict[str, Storage] = {"Q8_0": "q8_0", "Q4_0": "q4_0", "Q4_1": "q4_1"}
BLOCK_STORAGES = frozenset(_BLOCKS.values())


@dataclass(frozen=True, eq=False)
class RawMatrix:
    """A matrix, or a vector, of a file.

    storage: how `data` holds it. shape: of the weights, [rows, columns] or [n]. data: of f32 float32, of f16 float16,
    of bf16 uint16, in that shape; of the others uint8 [rows, bytes of a row], blocks of 32 weights as in GGUF.
    is_transposed: `data` holds the transpose instead.
    """

    storage: Storage
    shape: tuple[int, ...]
    data: NDArray[Any]
    is_transposed: bool = False

    @classmethod
    def stored(cls, raw: Bytes, type_name: str, shape: tuple[int, ...]) -> RawMatrix:
        """What a file holds: a view of `raw`, uint8 [bytes].

        Args:
            type_name: F32, F16, BF16 or F64 (safetensors and GGUF have the same names), or a block format of GGUF.
                Those that `storage` has no name for are expanded to float32, and so are vectors in blocks.
        """
        if type_name in _PLAIN:
            storage, code = _PLAIN[type_name]
            # Old safetensors files have headers of any length.
            return cls(storage, shape, np.require(raw.view(code).reshape(shape), requirements="A"))
        if type_name in _BLOCKS and len(shape) > 1:
            size = FORMATS[type_name].num_bytes(shape[-1:])
            return cls(_BLOCKS[type_name], shape, raw.reshape(*shape[:-1], size))
        if type_name == "F64":
            return cls("f32", shape, raw.view("<f8").reshape(shape).astype(np.float32))
        return cls("f32", shape, expand(raw, FORMATS[type_name]).reshape(shape))

    @property
    def mT(self) -> RawMatrix:  # noqa: N802 (its name in numpy and torch)
        """The transpose, without touching the data; ValueError for a vector."""
        *outer, rows, columns = self.shape
        return replace(self, shape=(*outer, columns, rows), is_transposed=not self.is_transposed)

    def __getitem__(self, rows: NDArray[np.int64]) -> RawMatrix:
        """A copy with the given rows, int64 [R], whatever they are stored in."""
        assert not self.is_transposed, "rows are taken before a matrix is transposed"
        return replace(self, shape=(len(rows), *self.shape[1:]), data=self.data[rows])

    def floats(self) -> Floats:
        """The weights as float32 in `shape`, each exactly what is stored."""
        if self.storage == "bf16":
            weights = (self.data.astype(np.uint32) << 16).view(np.float32)
        elif self.data.dtype == np.uint8:
            weights = expand(self.data.reshape(-1), FORMATS[self.storage.upper()])
            weights = weights.reshape(*self.data.shape[:-1], -1)
        else:
            weights = self.data.astype(np.float32, copy=False)
        return weights.mT if self.is_transposed else weights

    def in_order(self) -> RawMatrix:
        """The same with `data` in C order and not transposed; blocks, which cannot be turned, become float32."""
        if not self.is_transposed:
            return self
        if self.data.dtype == np.uint8:
            return RawMatrix("f32", self.shape, np.ascontiguousarray(self.floats()))
        return RawMatrix(self.storage, self.shape, np.ascontiguousarray(self.data.mT))

    def equals(self, other: RawMatrix) -> bool:
        """Whether the weights are the same, in whatever they are stored."""
        if self.storage == other.storage and self.data.dtype == np.uint8 and self.shape == other.shape:
            return bool(np.array_equal(self.data, other.data))
        return bool(np.array_equal(self.floats(), other.floats()))


def shared_storage(parts: tuple[RawMatrix, ...]) -> Storage:
    """How one matrix of all parts is computed on: as they are stored, or as float32 where they are not alike."""
    storages = {part.storage for part in parts}
    return storages.pop() if len(storages) == 1 else "f32"
