"""How an answer appears: thinking on stderr, dimmed on a terminal; the answer on stdout, so a pipe gets it alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from openbook.engine.transcript import Piece

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class StreamView:
    """Prints the pieces of answers as they come.

    Args:
        show_thinking: False leaves the thinking out.
        answer_stream: where the answer goes; None is stdout.
    """

    def __init__(self, *, show_thinking: bool, answer_stream: TextIO | None = None) -> None:
        self._show_thinking = show_thinking
        self._answers = answer_stream or sys.stdout
        self._thoughts = sys.stderr
        self._is_dimmed = self._thoughts.isatty() and "NO_COLOR" not in os.environ

    def show(self, pieces: Iterable[Piece]) -> None:
        """Print one answer to its end and finish the line, also when it is interrupted."""
        last = ""  # kind of the piece before
        try:
            for piece in pieces:
                if piece.kind == "reasoning" and not self._show_thinking:
                    continue
                if last == "reasoning" and piece.kind == "answer":
                    self._end_thinking()
                if piece.kind == "reasoning":
                    start = _DIM if self._is_dimmed and last != "reasoning" else ""
                    _put(self._thoughts, start + piece.text)
                else:
                    _put(self._answers, piece.text)
                last = piece.kind
        finally:
            if last == "reasoning":
                self._end_thinking()
            elif last == "answer":
                _put(self._answers, "\n")

    def _end_thinking(self) -> None:
        _put(self._thoughts, (_PLAIN if self._is_dimmed else "") + "\n")


def _put(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()
