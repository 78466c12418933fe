"""Split what a model speaks into reasoning and answer, whole or as it streams."""

from __future__ import annotations

from typing import Literal

from openbook.tokenizer.tokenizer import THINK_CLOSE, THINK_OPEN

Kind = Literal["reasoning", "answer"]


class ReasoningSplitter:
    """Splits text that comes in pieces. Marks are never shown, wherever the pieces cut them.

    Args:
        open_mark: begins the reasoning.
        close_mark: ends it.
        starts_in_reasoning: the prompt ended with the open mark already, as some families' templates do.
    """

    def __init__(
        self, open_mark: str = THINK_OPEN, close_mark: str = THINK_CLOSE, starts_in_reasoning: bool = False
    ) -> None:
        self._marks: dict[Kind, tuple[str, Kind]] = {
            "answer": (open_mark, "reasoning"),
            "reasoning": (close_mark, "answer"),
        }
        self._kind: Kind = "reasoning" if starts_in_reasoning else "answer"
        self._held = ""

    def feed(self, text: str) -> list[tuple[Kind, str]]:
        """The pieces that are certain after `text`; what may be the beginning of a mark is held back."""
        pieces: list[tuple[Kind, str]] = []
        text = self._held + text
        while True:
            mark, next_kind = self._marks[self._kind]
            before, found, after = text.partition(mark)
            if not found:
                break
            if before:
                pieces.append((self._kind, before))
            self._kind, text = next_kind, after
        num_held = next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
        shown, self._held = text[: len(text) - num_held], text[len(text) - num_held :]
        if shown:
            pieces.append((self._kind, shown))
        return pieces

    def flush(self) -> list[tuple[Kind, str]]:
        """What was held back, at the end of the answer."""
        rest, self._held = self._held, ""
        return [(self._kind, rest)] if rest else []


def split_reasoning(
    text: str, open_mark: str = THINK_OPEN, close_mark: str = THINK_CLOSE, starts_in_reasoning: bool = False
) -> tuple[str, str]:
    """Reasoning and answer of a whole text, marks left out. Reasoning that was cut off has an empty answer."""
    splitter = ReasoningSplitter(open_mark, close_mark, starts_in_reasoning)
    pieces = [*splitter.feed(text), *splitter.flush()]
    reasoning, answer = ("".join(piece for k, piece in pieces if k == kind) for kind in ("reasoning", "answer"))
    return reasoning, answer
