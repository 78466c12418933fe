"""The ledger, `trace.jsonl`: one line for each step, in order, never two for one step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import msgspec

from openbook.core.errors import UserError, one_line
from openbook.core.files import write_bytes


class Entry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One step as it happened. Floats are written in full: reading them back gives the same bits.

    step: 0-based, counted over all stages. batch: first 16 hex digits of the SHA-256 of the step's token arrays.
    cursor: where in the stage's data the step began. loss: mean negative log likelihood in nats a trained token.
    grad_norm: L2 norm before clipping. tokens: tokens read, padding not counted.
    """

    step: int
    stage: str
    batch: str
    cursor: dict[str, int]
    lr: float
    loss: float
    grad_norm: float
    tokens: int


class Ledger:
    """Appends entries; `sync` before a checkpoint is what makes a resume exact.

    Args:
        path: the file.
        num_steps: keep this many lines of what is there, drop the rest: those steps will be taken again.

    Raises:
        UserError: the file holds fewer whole lines than that, or cannot be written.
    """

    def __init__(self, path: Path, num_steps: int) -> None:
        self.path = path
        kept = list(_whole_lines(path, num_steps))
        if len(kept) < num_steps:
            raise UserError(
                f"the ledger {path} has {len(kept)} whole lines, the checkpoint expects {num_steps}: "
                "restore the file, or build into a new folder"
            )
        write_bytes(path, b"".join(kept))
        self._file = path.open("ab")

    def append(self, entry: Entry) -> None:
        """Add one step."""
        try:
            self._file.write(msgspec.json.encode(entry) + b"\n")
        except OSError as error:
            raise one_line(error, f"write {self.path}") from error

    def sync(self) -> None:
        """Force all lines to disk."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise one_line(error, f"write {self.path}") from error

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError as failure:
            if error is None:
                raise one_line(failure, f"write {self.path}") from failure


def read_ledger(path: Path) -> list[Entry]:
    """All entries of a ledger.

    Raises:
        UserError: the file is missing or a line is damaged.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise one_line(error, f"read the ledger {path}") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(msgspec.json.decode(line, type=Entry))
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise UserError(f"the ledger {path}, line {number}: {error}; restore the file from its source") from error
    return entries


def _whole_lines(path: Path, limit: int) -> Iterator[bytes]:
    """The first `limit` lines that end in a newline: a killed run may have left half a line."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if number >= limit or not line.endswith(b"\n"):
                return
            yield line
