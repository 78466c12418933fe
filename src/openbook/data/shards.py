"""A stage's data on disk: shards of packed rows, a record for each document, a manifest with the hash of every file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from openbook.core.config import Config, convert
from openbook.core.errors import UserError, one_line
from openbook.core.files import read_bytes, read_json, sha256_file
from openbook.data.pack import Rows

MANIFEST_FILE = "manifest.json"
RECORDS_FILE = "records.jsonl"
FORMAT = 1
_FIX = "remove this data folder and build it again"
_DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("<u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
}


class DataFile(Config, frozen=True, kw_only=True):
    """One file beside the manifest; `rows` is 0 for files that are no shards."""

    path: str
    bytes: int
    sha256: str
    rows: int = 0


class Manifest(Config, frozen=True, kw_only=True):
    """What a stage's data is.

    Attributes:
        seed: of the stage's mixture.
        mixture: its entries as in the recipe, defaults filled in.
        tokens: of all documents; padding is not counted.
        trained_tokens: those with loss mask 1.
        padding_share: padding over all tokens of all rows.
        documents_by_task, tokens_by_task: parts of `documents` and `tokens`.
        refused: problems left out and replaced: "published" equal one of a published test set, "too_long" do not fit
            into a row.
        generators: version of what made the problems and of what wrote the worked solutions.
        licenses: documents under each licence.
        tokenizer_sha256: of tokenizer.json.
    """

    format: int
    stage: str
    seed: int
    mixture: list[dict[str, Any]]
    documents: int
    rows: int
    row_tokens: int
    tokens: int
    trained_tokens: int
    padding_share: float
    documents_by_task: dict[str, int]
    tokens_by_task: dict[str, int]
    refused: dict[str, int]
    generators: dict[str, str]
    licenses: dict[str, int]
    tokenizer_sha256: str
    files: list[DataFile]

    @property
    def shards(self) -> list[DataFile]:
        """The files that hold rows, in order."""
        return [file for file in self.files if file.rows]


def shard_name(number: int) -> str:
    """Name of the shard of that number, from 0."""
    return f"rows-{number:05}.safetensors"


def write_shard(path: Path, rows: Rows) -> DataFile:
    """Write rows as one safetensors file."""
    from safetensors.numpy import save

    data = save({"tokens": rows.tokens, "loss_mask": rows.loss_mask, "documents": rows.documents})
    try:
        path.write_bytes(data)
    except OSError as error:
        raise one_line(error, f"write {path}") from error
    return data_file(path, rows=len(rows.tokens))


def data_file(path: Path, rows: int = 0) -> DataFile:
    """The manifest's line for a file."""
    return DataFile(path=path.name, bytes=path.stat().st_size, sha256=sha256_file(path), rows=rows)


def read_manifest(folder: Path) -> Manifest:
    """Read a data folder's manifest.

    Raises:
        UserError: it is missing, damaged or of another format.
    """
    path = folder / MANIFEST_FILE
    values = read_json(path, "data manifest")
    if isinstance(values, dict) and values.get("format", FORMAT) != FORMAT:
        raise UserError(f"the data manifest {path} has format {values['format']}, expected {FORMAT}: {_FIX}")
    return convert(values, Manifest, f"the data manifest {path}")


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest.

    Raises:
        UserError: the first file that is missing, has another size or another hash.
    """
    for file in manifest.files:
        path = folder / file.path
        try:
            size = path.stat().st_size
        except OSError as error:
            raise one_line(error, f"read the data file {path}") from error
        if size != file.bytes:
            raise UserError(f"the data file {path} has {size} bytes, its manifest says {file.bytes}: {_FIX}")
        found = sha256_file(path)
        if found != file.sha256:
            raise UserError(
                f"the data file {path} is damaged (SHA-256 {found[:16]}, its manifest says {file.sha256[:16]}): {_FIX}"
            )


def map_shard(path: Path) -> Rows:
    """Memory-map a shard: rows are read from disk when they are used.

    The format (https://github.com/huggingface/safetensors): length of the header as 8 little-endian bytes, the header
    as JSON with dtype, shape and offsets of each array, the arrays.

    Raises:
        UserError: the file is not such a shard.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int(data[:8].view("<u8")[0])
        header = msgspec.json.decode(data[8:start].tobytes())
        arrays = {name: _array(data[start:], header[name]) for name in Rows._fields}
    except OSError as error:
        raise one_line(error, f"read the data file {path}") from error
    except (msgspec.DecodeError, KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"the data file {path} is not a shard of rows: {_FIX}") from error
    return Rows(**arrays)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a data folder; the one of document i stands at i."""
    lines = read_bytes(folder / RECORDS_FILE, "file of records").splitlines()
    return [msgspec.json.decode(line) for line in lines]


def _array(data: NDArray[np.uint8], entry: dict[str, Any]) -> NDArray[Any]:
    begin, end = entry["data_offsets"]
    array: NDArray[Any] = data[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return array
