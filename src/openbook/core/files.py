"""Files that are either whole or absent: write beside, flush to disk, rename."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from openbook.core.errors import UserError, one_line

PARTIAL_SUFFIX = ".partial"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; rename it over `path` on success, remove it on failure.

    Raises:
        UserError: the disk is full or the place cannot be written to.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    except BaseException as error:
        with suppress(OSError):  # the folder may be what is wrong; the first error is the one to tell
            partial.unlink()
        if isinstance(error, OSError):
            raise one_line(error, f"write {path}") from error
        raise


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path` to fill; rename it to `path` on success, remove it on failure.

    Raises:
        UserError: the disk is full or the place cannot be written to.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in sorted(partial.rglob("*")):
            _flush(file)
        _flush(partial)
        partial.rename(path)
        _flush(path.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise one_line(error, f"write {path}") from error
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; msgspec structs and dataclasses are allowed inside."""
    write_bytes(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def read_bytes(path: Path, what: str = "file") -> bytes:
    """Read a whole file.

    Raises:
        UserError: it is missing or cannot be read; `what` names its role in the message.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise one_line(error, f"read the {what} {path}") from error


def read_json(path: Path, what: str = "file") -> Any:
    """Read JSON.

    Raises:
        UserError: the file is missing, cannot be read, or is not JSON.
    """
    data = read_bytes(path, what)
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"the {what} {path} is not valid JSON: {error}; restore the file from its source") from error


def require_absent(path: Path, option: str = "--out") -> None:
    """Refuse to write where something stands.

    Raises:
        UserError: `path` exists.
    """
    if path.exists() or path.is_symlink():
        raise UserError(
            f"{option} {path} exists already and nothing is overwritten: give a new path, or remove it first"
        )


def sha256_bytes(data: bytes) -> str:
    """SHA-256 as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 lower-case hex digits.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise one_line(error, f"read the file {path}") from error


def _flush(path: Path) -> None:
    """Force a file's or directory's bytes to disk, so that the rename after it never names lost data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
