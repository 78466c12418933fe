"""The ledger: exact floats, no step twice, half a line dropped, every line bound to those before it."""

from __future__ import annotations

import errno
import hashlib
import json
import math
from pathlib import Path

import pytest

from openbook.core.errors import UserError
from openbook.train.ledger import Entry, Ledger, SavedState, first_broken_link, read_ledger


def _entry(step: int) -> Entry:
    state = None
    if step % 3 == 2:
        state = SavedState(root="ab" * 32, weights="cd" * 32, cursor={"epoch": 0, "row": step, "document": 3 * step})
    loss = math.sqrt(step + 1)
    return Entry(step=step, stage="a", batch="0" * 16, lr=0.1 / 3, loss=loss, grad_norm=1 / 7, tokens=5, state=state)


def _write(path: Path, steps: range, num_steps: int) -> None:
    with Ledger(path, num_steps) as ledger:
        for step in steps:
            ledger.append(_entry(step))
        ledger.sync()


def test_entries_come_back_with_the_same_bits(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    _write(path, range(5), 0)
    assert read_ledger(path) == [_entry(step) for step in range(5)]


def test_a_line_is_what_the_docstring_says(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    _write(path, range(3), 0)
    first, _, third = path.read_text().splitlines()
    assert first == (
        '{"step":0,"stage":"a","batch":"0000000000000000","lr":"0x1.1111111111111p-5","loss":"0x1p+0",'
        '"grad_norm":"0x1.2492492492492p-3","tokens":5,"link":"' + json.loads(first)["link"] + '"}'
    )
    chain = bytes(32)
    for line in path.read_text().splitlines():
        link = json.loads(line)["link"]
        chain = hashlib.sha256(chain + line.replace(f',"link":"{link}"', "").encode()).digest()
        assert link == chain.hex()[: len(link)]
        assert len(link) == (64 if "state" in line else 16)
    assert list(json.loads(third)["state"]) == ["root", "weights", "cursor"]


@pytest.mark.parametrize(
    ("line", "old", "new"),
    [
        (1, b'"tokens":5', b'"tokens":6'),
        (2, b'"row":2', b'"row":1'),
        (3, b'"link":"', b'"link":"0'),
        (4, b'"link":"', b'"lonk":"'),
    ],
)
def test_a_changed_line_breaks_the_chain_there(tmp_path: Path, line: int, old: bytes, new: bytes) -> None:
    path = tmp_path / "trace.jsonl"
    _write(path, range(6), 0)
    assert first_broken_link(path) is None
    lines = path.read_bytes().splitlines(keepends=True)
    assert old in lines[line]
    path.write_bytes(b"".join([*lines[:line], lines[line].replace(old, new), *lines[line + 1 :]]))
    assert first_broken_link(path) == line
    with pytest.raises(UserError, match=f"line {line + 1}: its link does not follow from the lines up to it: restore"):
        Ledger(path, 6)


def test_a_dropped_or_swapped_line_breaks_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    _write(path, range(6), 0)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    assert first_broken_link(path) == 2
    path.write_bytes(b"".join([lines[0], lines[2], lines[1], *lines[3:]]))
    assert first_broken_link(path) == 1
    path.write_bytes(b"".join(lines[1:]))
    assert first_broken_link(path) == 0


def test_a_ledger_from_before_links_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"step":0,"stage":"a","batch":"00","cursor":{"epoch":0,"row":0,"document":4},"lr":0.1,"loss":2.5,'
        '"grad_norm":1.0,"tokens":5}\n'
    )
    assert read_ledger(path) == [
        Entry(step=0, stage="a", batch="00", lr=0.1, loss=2.5, grad_norm=1.0, tokens=5, state=None)
    ]
    assert first_broken_link(path) == 0


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


@pytest.mark.parametrize("loss", [b'"?"', b"[1]", b'"0x1p+99999"'])
def test_a_damaged_line_is_named(tmp_path: Path, loss: bytes) -> None:
    path = tmp_path / "trace.jsonl"
    _write(path, range(2), 0)
    path.write_bytes(path.read_bytes().replace(b'"loss":"0x1p+0"', b'"loss":' + loss))
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
