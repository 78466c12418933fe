"""The ledger, `trace.jsonl`: one line for each step, in order, never two for one step, each bound to all before it.

A line is one JSON object without spaces, its members in this order:

    step, stage, batch, lr, loss, grad_norm, tokens, state (where a state is saved), link

Floats are strings, as C's printf("%a") writes a double: reading them back gives the same bits in any language.

Links. `body` is the line without its last member `link`, so that it ends in `}`. With chain(-1) = 32 zero bytes,

    chain(i) = SHA-256(chain(i - 1), body(i)),   32 bytes

and `link` holds chain(i) as lower-case hex: all 64 digits in a line with a state, the first 16 in any other, where
they only serve to find the first line that was changed. So one number, the last line's link, names the whole ledger.

Not in a line: the data cursor, as it is rows-of-a-batch times step, and the batch digest says which documents came of
it. Where a state is saved it is there, and it is part of the state's root.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import msgspec

from openbook.core.errors import UserError, one_line
from openbook.core.files import write_bytes
from openbook.core.hex_float import hex_float

_START = bytes(32)
_LINK = re.compile(rb',"link":"([0-9a-f]{16}|[0-9a-f]{64})"\}\n?$')
_SHORT_LINK_DIGITS = 16


class SavedState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole state after a step; `openbook.checkpoint.state_root` defines the roots.

    root: of everything. weights: of the weights alone. cursor: where in the stage's data the next step begins.
    """

    root: str
    weights: str
    cursor: dict[str, int]


class Entry(msgspec.Struct, kw_only=True):
    """One step as it happened.

    step: 0-based, counted over all stages. batch: first 16 hex digits of the SHA-256 of the step's token arrays.
    loss: mean negative log likelihood in nats a trained token. grad_norm: L2 norm before clipping. tokens: tokens read,
    padding not counted. state: after the step, where a state is saved: every `checkpoint_steps` and at a stage's end.
    """

    step: int
    stage: str
    batch: str
    lr: float
    loss: float
    grad_norm: float
    tokens: int
    state: SavedState | None = None


class _Line(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A line as it may be read. Before links there was a cursor in each, and floats were numbers."""

    step: int
    stage: str
    batch: str
    lr: str | float
    loss: str | float
    grad_norm: str | float
    tokens: int
    state: SavedState | None = None
    link: str = ""
    cursor: dict[str, int] | None = None


class StepSink(Protocol):
    """What training tells its steps to: a ledger that is written, or one that is compared."""

    def append(self, entry: Entry) -> None:
        """Take one step."""

    def sync(self) -> None:
        """All steps so far must last: a state is saved next."""


class Ledger:
    """Appends entries; `sync` before a checkpoint is what makes a resume exact.

    Args:
        path: the file.
        num_steps: keep this many lines of what is there, drop the rest: those steps will be taken again.

    Raises:
        UserError: the file holds fewer whole lines than that, one of them was changed, or it cannot be written.
    """

    def __init__(self, path: Path, num_steps: int) -> None:
        self.path = path
        kept = list(_whole_lines(path, num_steps))
        if len(kept) < num_steps:
            raise UserError(
                f"the ledger {path} has {len(kept)} whole lines, the checkpoint expects {num_steps}: "
                "restore the file, or build into a new folder"
            )
        self._chain = _START
        for number, line in enumerate(kept, start=1):
            self._chain, is_good = _follow(self._chain, line)
            if not is_good:
                raise UserError(
                    f"the ledger {path}, line {number}: its link does not follow from the lines up to it: "
                    "restore the file, or build into a new folder"
                )
        write_bytes(path, b"".join(kept))
        self._file = path.open("ab")

    def append(self, entry: Entry) -> None:
        """Add one step."""
        line, self._chain = _line(entry, self._chain)
        try:
            self._file.write(line)
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
    """All entries of a ledger; their links are not followed, see `first_broken_link`.

    Raises:
        UserError: the file is missing or a line is damaged.
    """
    entries = []
    for number, line in enumerate(_read_lines(path), start=1):
        try:
            entries.append(_entry(msgspec.json.decode(line, type=_Line)))
        except (msgspec.DecodeError, ValueError, OverflowError) as error:
            raise UserError(f"the ledger {path}, line {number}: {error}; restore the file from its source") from error
    return entries


def first_broken_link(path: Path) -> int | None:
    """Index of the first line whose link does not follow from the lines up to it; None if all do.

    Raises:
        UserError: the file is missing.
    """
    chain = _START
    for index, line in enumerate(_read_lines(path)):
        chain, is_good = _follow(chain, line)
        if not is_good:
            return index
    return None


def _line(entry: Entry, chain: bytes) -> tuple[bytes, bytes]:
    """The line of an entry, and the chain up to it."""
    values: dict[str, Any] = {
        "step": entry.step,
        "stage": entry.stage,
        "batch": entry.batch,
        "lr": hex_float(entry.lr),
        "loss": hex_float(entry.loss),
        "grad_norm": hex_float(entry.grad_norm),
        "tokens": entry.tokens,
    }
    if entry.state is not None:
        values["state"] = entry.state
    body = msgspec.json.encode(values)
    chain = hashlib.sha256(chain + body).digest()
    link = chain.hex() if entry.state is not None else chain.hex()[:_SHORT_LINK_DIGITS]
    return body[:-1] + f',"link":"{link}"}}\n'.encode(), chain


def _follow(chain: bytes, line: bytes) -> tuple[bytes, bool]:
    """The chain up to `line`, and whether its link says so."""
    found = _LINK.search(line)
    if found is None:
        return chain, False
    body = line[: found.start()] + b"}"
    chain = hashlib.sha256(chain + body).digest()
    has_state = b'"state":' in body
    is_long = len(found[1]) > _SHORT_LINK_DIGITS
    return chain, is_long == has_state and chain.hex().encode().startswith(found[1])


def _entry(line: _Line) -> Entry:
    return Entry(
        step=line.step,
        stage=line.stage,
        batch=line.batch,
        lr=_float(line.lr),
        loss=_float(line.loss),
        grad_norm=_float(line.grad_norm),
        tokens=line.tokens,
        state=line.state,
    )


def _float(value: str | float) -> float:
    return float.fromhex(value) if isinstance(value, str) else value


def _read_lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except OSError as error:
        raise one_line(error, f"read the ledger {path}") from error


def _whole_lines(path: Path, limit: int) -> Iterator[bytes]:
    """The first `limit` lines that end in a newline: a killed run may have left half a line."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if number >= limit or not line.endswith(b"\n"):
                return
            yield line
