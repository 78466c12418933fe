"""From one sequence's token ids to the text a reader sees: thinking and answer apart, stop strings never in part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from openbook.tokenizer.parse import Kind, ReasoningSplitter
from openbook.tokenizer.tokenizer import THINK_CLOSE, THINK_OPEN, StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Piece:
    """A stretch of new text; `kind` is "reasoning" or "answer"."""

    kind: Kind
    text: str


class Transcript:
    """Collects what one sequence says.

    Args:
        tokenizer: decodes its tokens; its stop ids end it.
        stop: strings that end the answer; they are not looked for in the reasoning.
        starts_in_reasoning: the prompt ended with the opening mark already.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, starts_in_reasoning: bool = False) -> None:
        self.text, self.reasoning = "", ""
        self.is_stopped = False
        self._stop_ids = tokenizer.stop_ids
        control = tokenizer.control_tokens.items()
        self._hidden_ids = {index for token, index in control if token not in (THINK_OPEN, THINK_CLOSE)}
        self._decoder = StreamDecoder(tokenizer)
        self._splitter = ReasoningSplitter(starts_in_reasoning=starts_in_reasoning)
        self._stop = StopStrings(stop)

    def push(self, token_id: int) -> list[Piece]:
        """The text that is certain after one more token; afterwards `is_stopped` says whether it was the last one."""
        if token_id in self._stop_ids:
            pieces = self.close()
            self.is_stopped = True
            return pieces
        if token_id in self._hidden_ids:
            return []
        return self._show(self._splitter.feed(self._decoder.feed([token_id])))

    def close(self) -> list[Piece]:
        """The text that was held back, when no token follows."""
        pieces = self._show([*self._splitter.feed(self._decoder.flush()), *self._splitter.flush()])
        return pieces if self.is_stopped else [*pieces, *self._record("answer", self._stop.flush())]

    def _show(self, parts: Iterable[tuple[Kind, str]]) -> list[Piece]:
        pieces: list[Piece] = []
        for kind, text in parts:
            if kind == "reasoning":
                pieces += self._record(kind, text)
            elif not self.is_stopped:
                shown, self.is_stopped = self._stop.feed(text)
                pieces += self._record(kind, shown)
        return pieces

    def _record(self, kind: Kind, text: str) -> list[Piece]:
        if kind == "reasoning":
            text = text if self.reasoning else text.lstrip("\n")
            self.reasoning += text
        else:
            # Some families put empty lines between the closing mark and the answer.
            text = text if self.text else text.lstrip("\n")
            self.text += text
        return [Piece(kind, text)] if text else []


class StopStrings:
    """Cuts a text that comes in pieces before the first stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that is certain to stand before any stop string, and whether one was found."""
        text = self._held + text
        found = [index for index in (text.find(stop) for stop in self._stop) if index >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, and is not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
