"""Whether a sequence thinks or answers, token by token, and how to end its thinking when the budget is spent.

A reader follows one kind of format: marks around the thinking, or harmony's channels. It agrees with the parsers in
`tokenizer/parse.py`, which split the text; here it is about the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol

from openbook.engine.transcript import opens_thinking
from openbook.tokenizer.marks import ChatFormat, HarmonyMarks, ThinkingMarks
from openbook.tokenizer.parse import overlap
from openbook.tokenizer.tokenizer import StreamDecoder, Tokenizer

# Where the next token will stand; a header is harmony's, and belongs to neither.
Place = Literal["thinking", "answer", "header"]


class ThinkingTracker:
    """Follows one sequence.

    Args:
        tokenizer: the model's.
        chat_format: how it marks its thinking; without any, everything is answer.
        prompt_ids: what it was given, which may have opened the thinking.
        budget: most tokens of thinking; None is no limit.
        has_call_headers: where the format is harmony, the answer is a call, and begins with the header of its message.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_format: ChatFormat,
        prompt_ids: Sequence[int],
        budget: int | None = None,
        *,
        has_call_headers: bool = False,
    ) -> None:
        self.num_thinking_tokens = 0  # marks and headers not counted, unless a mark takes several tokens
        self._budget, self._is_closing = budget, False
        self._reader: _Reader
        if chat_format.harmony:
            self._reader = _ChannelReader(tokenizer, chat_format.harmony, prompt_ids, has_call_headers)
        elif chat_format.thinking:
            self._reader = _MarkReader(tokenizer, chat_format, chat_format.thinking, prompt_ids)
        else:
            self._reader = _AnswerReader()

    def push(self, token_id: int) -> None:
        """Take the next token of the sequence into account."""
        was_thinking = self.is_thinking
        self._reader.read(token_id)
        if not self.is_thinking:
            self._is_closing = False
        elif was_thinking and not self._is_closing:
            self.num_thinking_tokens += 1

    @property
    def is_thinking(self) -> bool:
        """Whether the next token belongs to the thinking, or ends it."""
        return self._reader.place == "thinking"

    @property
    def is_answering(self) -> bool:
        """Whether the next token belongs to the answer, unless it opens the thinking."""
        return self._reader.is_answering

    def opening_ids(self) -> list[int]:
        """Tokens that may come next on the way to thinking before the answer: [] where it is too late for that.

        They spell the mark, or the header, as the tokenizer would.
        """
        return [] if self._is_budget_spent else _next_ids(self._reader.openings)

    def answer_ids(self) -> list[int]:
        """Tokens that may come next on the way to the answer, where a header stands before it; else []."""
        return [] if self.is_answering else _next_ids(self._reader.answer_headers)

    def closing_ids(self) -> list[int]:
        """If the budget is spent on thinking that goes on, the tokens that end it and begin the answer.

        They are told once, to be pushed before any other; else [].
        """
        if not self.is_thinking or self._is_closing or not self._is_budget_spent:
            return []
        self._is_closing = True
        return self._reader.closing()

    @property
    def text_marks(self) -> ThinkingMarks | None:
        """The marks, where they are text that tokens may cut anywhere."""
        return self._reader.text_marks

    @property
    def begun_mark(self) -> str:
        """What has been said of the next such mark."""
        return self._reader.begun_mark

    @property
    def _is_budget_spent(self) -> bool:
        return self._budget is not None and self.num_thinking_tokens >= self._budget


class _Reader(Protocol):
    """Reads the tokens of one kind of format."""

    place: Place
    text_marks: ThinkingMarks | None  # where the marks are text
    begun_mark: str  # what has been said of the next one

    @property
    def is_answering(self) -> bool: ...

    @property
    def openings(self) -> list[list[int]]:
        """What is left of the ways to open the thinking from here."""

    @property
    def answer_headers(self) -> list[list[int]]:
        """What is left of the ways to begin the answer from here."""

    def read(self, token_id: int) -> None: ...

    def closing(self) -> list[int]: ...


class _AnswerReader:
    """For formats without thinking."""

    def __init__(self) -> None:
        self.place: Place = "answer"
        self.is_answering = True
        self.openings: list[list[int]] = []
        self.answer_headers: list[list[int]] = []
        self.text_marks: ThinkingMarks | None = None
        self.begun_mark = ""

    def read(self, token_id: int) -> None:
        pass

    def closing(self) -> list[int]:
        return []


class _MarkReader:
    """For marks around the thinking, control tokens or text."""

    def __init__(
        self, tokenizer: Tokenizer, chat_format: ChatFormat, marks: ThinkingMarks, prompt_ids: Sequence[int]
    ) -> None:
        self._tokenizer, self._marks = tokenizer, marks
        control = tokenizer.control_tokens
        self._control_ids = frozenset(control.values())
        self._control = {control[mark]: mark for mark in (marks.open, marks.close) if mark in control}
        self.text_marks = marks if len(self._control) < 2 else None
        self._decoder = StreamDecoder(tokenizer)
        self.begun_mark = ""
        self.place: Place = "thinking" if opens_thinking(tokenizer, chat_format, prompt_ids) else "answer"
        self.answer_headers: list[list[int]] = []
        closed = replace(chat_format, thinking=ThinkingMarks(open=marks.close, close=marks.open))
        is_over = opens_thinking(tokenizer, closed, prompt_ids)  # the prompt ends with the closing mark
        self.openings = [] if is_over or self.place == "thinking" else self._ways_to_open()
        # Who breaks the line behind the opening mark does so before the closing one too, and twice behind it.
        self._line_break = ""
        self._is_first_thought = True
        self._last_id: int | None = None
        if self.place == "thinking" and prompt_ids:
            tail = tokenizer.decode(prompt_ids[-1:])
            self._line_break = "\n" if tail.endswith("\n") else ""
            self._is_first_thought = not self._line_break

    @property
    def is_answering(self) -> bool:
        return self.place == "answer"

    def read(self, token_id: int) -> None:
        self.openings = [way[1:] for way in self.openings if way[:1] == [token_id]]
        self._last_id = token_id
        mark = self._control.get(token_id)
        if self.text_marks is None:
            if mark == self._next_mark:
                self._turn()
            elif self.place == "thinking" and self._is_first_thought:
                self._see_first_thought(self._tokenizer.decode([token_id]))
        elif mark is not None:
            self._read_text(self._decoder.flush())
            self._decoder = StreamDecoder(self._tokenizer)
            self._read_text(mark)
        elif token_id not in self._control_ids:
            self._read_text(self._decoder.feed([token_id]))

    def closing(self) -> list[int]:
        close, begun = self._marks.close, self.begun_mark
        has_broken = self._last_id is not None and self._tokenizer.decode([self._last_id]).endswith("\n")
        before = "" if begun or has_broken or self._is_first_thought else self._line_break
        behind = self._line_break * 2
        if self.text_marks is None:
            return [*self._encode(before), self._tokenizer.control_tokens[close], *self._encode(behind)]
        return self._encode(before + close[len(begun) :] + behind)

    def _read_text(self, text: str) -> None:
        self.begun_mark += text
        while True:
            before, found, behind = self.begun_mark.partition(self._next_mark)
            if self.place == "thinking" and self._is_first_thought and before:
                self._see_first_thought(before)
            if not found:
                break
            self._turn()
            self.begun_mark = behind
        self.begun_mark = self.begun_mark[len(self.begun_mark) - overlap(self.begun_mark, self._next_mark) :]

    def _see_first_thought(self, text: str) -> None:
        self._line_break = "\n" if text.startswith("\n") else ""
        self._is_first_thought = False

    @property
    def _next_mark(self) -> str:
        return self._marks.close if self.place == "thinking" else self._marks.open

    def _turn(self) -> None:
        self.place = "answer" if self.place == "thinking" else "thinking"
        self._is_first_thought = self.place == "thinking"

    def _ways_to_open(self) -> list[list[int]]:
        if self.text_marks is None:
            return [[self._tokenizer.control_tokens[self._marks.open]]]
        texts = [self._marks.open, f"{self._marks.open}\n"]
        return [self._tokenizer.encode(text, follows="control") for text in texts]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, follows="text") if text else []


class _ChannelReader:
    """For harmony: messages in channels, each behind a header."""

    def __init__(
        self, tokenizer: Tokenizer, marks: HarmonyMarks, prompt_ids: Sequence[int], has_call_headers: bool
    ) -> None:
        self._tokenizer, self._marks = tokenizer, marks
        self.text_marks: ThinkingMarks | None = None
        self.begun_mark = ""
        control = tokenizer.control_tokens
        self._control_ids = frozenset(control.values())
        self._steering = {control[token]: token for token in (*marks.tokens, *marks.stops) if token in control}
        start, channel, message = control[marks.start], control[marks.channel], control[marks.message]
        self._begin = [start, *self._encode("assistant")]
        self._thoughts = [*self._begin, channel, *self._encode(marks.thinking_channel), message]
        final = [*self._begin, channel, *self._encode("final"), message]
        self._answer = self._begin if has_call_headers else final
        self.place: Place = "header"
        self._header = ""
        self._said: list[int] = []  # since the last message ended
        ids = list(prompt_ids)
        for token_id in ids[len(ids) - ids[::-1].index(start) - 1 :] if start in ids else []:
            self.read(token_id)

    @property
    def is_answering(self) -> bool:
        if self._answer == self._begin:
            return self._said[: len(self._begin)] == self._begin and self.place != "thinking"
        return self.place == "answer"

    @property
    def openings(self) -> list[list[int]]:
        return self._rest_of(self._thoughts)

    @property
    def answer_headers(self) -> list[list[int]]:
        return self._rest_of(self._answer)

    def read(self, token_id: int) -> None:
        token = self._steering.get(token_id)
        self._said.append(token_id)
        if self.place == "header" and token == self._marks.message:
            channel = self._header.partition(self._marks.channel)[2].partition(self._marks.constrain)[0].split()
            self.place = "thinking" if channel[:1] == [self._marks.thinking_channel] else "answer"
        elif self.place == "header" and token in (self._marks.channel, self._marks.constrain):
            self._header += token or ""
        elif token is not None:
            self.place, self._header = "header", ""
            self._said = [token_id] if token == self._marks.start else []
        elif self.place == "header" and token_id not in self._control_ids:
            self._header += self._tokenizer.decode([token_id])

    def closing(self) -> list[int]:
        return [self._tokenizer.control_tokens[self._marks.end], *self._answer]

    def _rest_of(self, header: list[int]) -> list[list[int]]:
        count = len(self._said)
        return [header[count:]] if self.place == "header" and header[:count] == self._said else []

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, follows="text")


def _next_ids(ways: list[list[int]]) -> list[int]:
    return sorted({way[0] for way in ways if way})
