"""Progress: plain lines in a file, a bar on a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest

from openbook.core.progress import Progress, format_duration


class Clock:
    """Stands for the time module."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("openbook.core.progress.time", made)
    return made


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (-5, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (125, "2:05"), (3599.9, "1:00:00"), (5025, "1:23:45")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_line_every_ten_seconds_and_one_at_the_end(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("train one", 40, stream=stream) as progress:
        for done in range(1, 41):
            clock.now_s += 1.0
            progress.update(done, f"loss {done}")
    assert stream.getvalue().splitlines() == [
        "train one     25%  0:30 left  loss 10",
        "train one     50%  0:20 left  loss 20",
        "train one     75%  0:10 left  loss 30",
        "train one    100%  0:00 left  loss 40",
        "train one    done in 0:40",
    ]


def test_what_a_resumed_stage_had_done_does_not_count_for_its_speed(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("train", 100, start=60, stream=stream) as progress:
        clock.now_s += 10.0
        progress.update(60)
        clock.now_s += 10.0
        progress.update(80)
    assert stream.getvalue().splitlines()[:2] == ["train         60%  ? left", "train         80%  0:20 left"]


def test_nothing_is_called_done_that_failed() -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Progress("train", 2, stream=stream) as progress:
        progress.update(1)
        raise RuntimeError
    assert stream.getvalue() == ""


def test_a_stage_of_nothing_is_done(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("data", 0, stream=stream) as progress:
        clock.now_s += 11.0
        progress.update(0)
    assert stream.getvalue().splitlines() == ["data           0%  ? left", "data         done in 0:11"]


def test_a_terminal_gets_a_bar() -> None:
    leader, follower = pty.openpty()
    code = (
        "from openbook.core.progress import Progress\n"
        "with Progress('train', 4) as progress:\n"
        "    for done in range(1, 5): progress.update(done, f'loss {5 - done}')\n"
    )
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # how Linux reports that the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"train +━+ 100% +0:00 left +loss 1", text), text
    assert "done in" not in text
