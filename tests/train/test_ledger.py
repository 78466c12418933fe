"""The ledger: exact floats, no step twice, half a line dropped."""

from __future__ import annotations

import errno
import math
from pathlib import Path

import pytest

from openbook.core.errors import UserError
from openbook.train.ledger import Entry, Ledger, read_ledger


def _entry(step: int) -> Entry:
    loss = math.sqrt(step + 1)
    cursor = {"epoch": 0, "row": step, "document": 3 * step}
    return Entry(step=step, stage="a", batch="0" * 16, cursor=cursor, lr=0.1 / 3, loss=loss, grad_norm=1 / 7, tokens=5)


def _write(path: Path, steps: range, num_steps: int) -> None:
    with Ledger(path, num_steps) as ledger:
        for step in steps:
            ledger.append(_entry(step))
        ledger.sync()


def test_entries_come_back_with_the_same_bits(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    _write(path, range(5), 0)
    assert read_ledger(path) == [_entry(step) for step in range(5)]


def test_a_resume_drops_later_steps_and_a_half_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    _write(path, range(5), 0)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 5, "sta')
    _write(path, range(3, 5), 3)
    assert path.read_bytes() == whole


def test_too_few_lines_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    _write(path, range(2), 0)
    with pytest.raises(UserError, match="has 2 whole lines, the checkpoint expects 3: restore the file"):
        Ledger(path, 3)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    _write(path, range(2), 0)
    path.write_bytes(path.read_bytes().replace(b'"loss":1.0', b'"loss":"?"'))
    with pytest.raises(UserError, match=r"trace.jsonl, line 1: .*restore the file from its source"):
        read_ledger(path)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "trace.jsonl"
    with Ledger(path, 0) as ledger:
        ledger.append(_entry(0))
        monkeypatch.setattr("openbook.train.ledger.os.fsync", full)
        with pytest.raises(UserError, match=r"No space left on device; free some space and .* --resume"):
            ledger.sync()
        monkeypatch.undo()
