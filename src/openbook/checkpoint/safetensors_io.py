"""Named tensors in a safetensors file, written whole or not at all; read as tensors, or as stored without torch.

Format: https://github.com/huggingface/safetensors#format (8 bytes of length, then JSON, then the tensors).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from openbook.checkpoint.gguf_io import MappedFile
from openbook.checkpoint.raw_matrix import RawMatrix
from openbook.core.errors import UserError, one_line
from openbook.core.files import write_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Longest header that safetensors itself reads, in bytes (its MAX_HEADER_SIZE).
_MOST_HEADER_BYTES = 100_000_000
# Bytes of one number in each kind that a file may hold.
_STORED_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
# Of which a `RawMatrix` can be made.
_RAW_TYPES = ("F32", "F16", "BF16", "F64")


class StoredArray(NamedTuple):
    """A tensor as a file's header has it. type_name: as there, "F32". start: of its bytes in the file."""

    type_name: str
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * _STORED_BYTES[self.type_name]


def read_header(path: Path) -> dict[str, StoredArray]:
    """The tensors of a file, from its header alone.

    Raises:
        UserError: the file is missing, cannot be read, is truncated, corrupt or not safetensors.
    """
    try:
        with path.open("rb") as stream:
            file_size = path.stat().st_size
            start = stream.read(8)
            size = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 < size <= min(_MOST_HEADER_BYTES, file_size - 8):
                raise _damaged(path, "its header is damaged")
            header = stream.read(size)
    except OSError as error:
        raise one_line(error, f"read the weights {path}") from error
    arrays: dict[str, StoredArray] = {}
    try:
        entries: Any = msgspec.json.decode(header)
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            first, end = entry["data_offsets"]
            array = StoredArray(entry["dtype"], tuple(entry["shape"]), 8 + size + first)
            if not _is_size(first, *array.shape) or array.num_bytes != end - first:
                raise ValueError(f"the bytes of {name}")
            arrays[name] = array
    except (msgspec.DecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, "its header is damaged") from error
    end = 8 + size
    for array in sorted(arrays.values(), key=lambda array: (array.start, array.num_bytes)):
        if array.start != end:
            raise _damaged(path, "its tensors overlap or have gaps between them")
        end += array.num_bytes
    if end != file_size:
        raise _damaged(path, "it ends before its tensors do" if end > file_size else "it goes on behind its tensors")
    return arrays


def _is_size(*numbers: object) -> bool:
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)


class RawFiles(Mapping[str, RawMatrix]):
    """The tensors of safetensors files by name, as stored: views of the mapped files, private to this process.

    Args:
        paths: of the files.
        where: names the model in messages.

    Raises:
        UserError: a file is missing, cannot be read, is truncated, corrupt or not safetensors; a tensor that is asked
            for holds other numbers than floats of 16 bits or more.
    """

    def __init__(self, paths: Iterable[Path], where: str) -> None:
        self._where = where
        self._arrays: dict[str, tuple[MappedFile, StoredArray]] = {}
        for path in paths:
            file = MappedFile(path)
            self._arrays.update({name: (file, array) for name, array in read_header(path).items()})

    def __getitem__(self, name: str) -> RawMatrix:
        file, array = self._arrays[name]
        if array.type_name not in _RAW_TYPES:
            raise UserError(
                f"{self._where}: {name} holds {array.type_name}, expected one of {', '.join(_RAW_TYPES)}: weights and "
                "config.json do not belong together, fetch both again"
            )
        raw = file.data[array.start : array.start + array.num_bytes]
        return RawMatrix.stored(raw, array.type_name, array.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` atomically; equal tensors give equal bytes.

    Raises:
        UserError: the file cannot be written.
    """
    import safetensors.torch

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One metadata key only: their order in the file is random. Transformers asks for this one.
    write_bytes(path, safetensors.torch.save(plain, metadata={"format": "pt"}))


class TensorFiles(Mapping[str, "Tensor"]):
    """The tensors of safetensors files by name, each read when it is asked for.

    On the CPU a tensor is a view of the mapped file, private to this process: its bytes are read once, when they are
    looked at, and the memory they take is the system's file cache.

    Raises:
        UserError: a file is missing, cannot be read, is truncated, corrupt or not safetensors.
    """

    def __init__(self, paths: Iterable[Path], device: torch.device | str = "cpu") -> None:
        self._files: dict[str, Any] = {}
        for path in paths:
            file = _open(path, device)
            self._files.update(dict.fromkeys(file.keys(), file))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read all tensors of a file.

    Raises:
        UserError: the file is missing, cannot be read, is truncated, corrupt or not safetensors.
    """
    return dict(TensorFiles([path], device))


def _open(path: Path, device: torch.device | str) -> Any:
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a safetensors file: give the file inside it")
    try:
        with path.open("rb"):
            pass  # safetensors reports a missing or unreadable file in words of its own
        return safe_open(path, framework="pt", device=str(device))
    except OSError as error:
        raise one_line(error, f"read the weights {path}") from error
    except SafetensorError as error:
        reason = str(error).splitlines()[0].removeprefix("Error while deserializing header: ")[:120]
        raise _damaged(path, reason) from error


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"the weights {path} are not a whole safetensors file ({reason}): copy or download the file again")
