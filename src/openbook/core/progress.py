"""Progress of long work: a bar on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

PLAIN_INTERVAL_S = 10.0


def format_duration(seconds: float) -> str:
    """Seconds as "1:23:45" or "2:05"."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


class Progress:
    """One stage of long work. Use as a context manager and call `update` as often as you like.

    Args:
        stage: name shown at the left.
        total: number of units of work.
        start: units already done (a resumed stage); they do not count for the speed.
        stream: where to write; a terminal gets a bar, anything else a line every 10 seconds.
    """

    def __init__(self, stage: str, total: int, *, start: int = 0, stream: TextIO | None = None) -> None:
        self.stage, self.total, self.start, self.done = stage, total, start, start
        self._stream = stream or sys.stderr
        self._began_s = time.monotonic()
        self._shown_s = self._began_s
        self._bar = None
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description:<12}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}% {task.fields[left]:>8} left  {task.fields[note]}"),
                console=Console(file=self._stream),
            )
            self._bar_task = self._bar.add_task(stage, total=total, completed=start, left="?", note="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            self._line(f"done in {format_duration(time.monotonic() - self._began_s)}")

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` of `total` units are finished; `note` is free text such as loss and tokens/s."""
        self.done = done
        now_s = time.monotonic()
        fresh = done - self.start
        left_s = (now_s - self._began_s) / fresh * (self.total - done) if fresh > 0 else None
        left = format_duration(left_s) if left_s is not None else "?"
        if self._bar:
            self._bar.update(self._bar_task, completed=done, left=left, note=note)
        elif now_s - self._shown_s >= PLAIN_INTERVAL_S:
            self._shown_s = now_s
            self._line(f"{done / max(1, self.total):4.0%}  {left} left  {note}".rstrip())

    def _line(self, text: str) -> None:
        print(f"{self.stage:<12} {text}", file=self._stream, flush=True)
