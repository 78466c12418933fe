"""From one sequence's token ids to the text a reader sees: thinking and answer apart, stop strings never in part."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from openbook.tokenizer.marks import ChatFormat, detect_format
from openbook.tokenizer.parse import Kind, Part, SpeechParser, make_parser, overlap
from openbook.tokenizer.tokenizer import StreamDecoder, Tokenizer
from openbook.tokenizer.tools import ToolCall, make_call_id

_MAX_MARK_IDS = 16  # more than any opening mark and the white space behind it take


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
        chat_format: how the model marks thinking and calls; None finds out from the tokenizer alone.
        prompt_ids: what the model was given: it may open the thinking, and it decides the ids of calls.
        tool_names: the tools on offer.
        stop_ids: tokens that end it beside the tokenizer's own.
        ignores_own_stops: whether it goes on behind the tokenizer's own.
        is_text: it continues a text: everything is answer, from the first line break on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        chat_format: ChatFormat | None = None,
        prompt_ids: Sequence[int] = (),
        tool_names: Collection[str] = (),
        stop_ids: Collection[int] = (),
        ignores_own_stops: bool = False,
        is_text: bool = False,
    ) -> None:
        chat_format = chat_format or detect_format(tokenizer.control_tokens, "")
        control = tokenizer.control_tokens
        self.text, self.reasoning = "", ""
        self.tool_calls: list[ToolCall] = []  # each as soon as it is complete
        self.is_stopped = False
        self._tokenizer, self._prompt_ids = tokenizer, prompt_ids
        own = tokenizer.stop_ids | {control[token] for token in chat_format.stops if token in control}
        self.own_stop_ids = own  # where the model itself would end
        self._stop_ids = frozenset(stop_ids) | (frozenset() if ignores_own_stops else own)
        self._control = {index: token for token, index in control.items()}
        self._decoder = StreamDecoder(tokenizer)
        self._is_text = is_text
        if is_text:
            chat_format = ChatFormat()
            # What follows is no first text: SentencePiece families would drop its leading space.
            self._decoder.feed([index for index in prompt_ids[-1:] if index not in self._control])
            self._decoder.flush()
        self._parser = make_parser(
            chat_format,
            control,
            starts_in_reasoning=opens_thinking(tokenizer, chat_format, prompt_ids),
            tool_names=tool_names,
        )
        self._stop = StopStrings(stop)
        if chat_format.harmony:
            _read_open_header(self._parser, tokenizer, prompt_ids, chat_format.harmony.start)

    def push(self, token_id: int) -> list[Piece]:
        """The text that is certain after one more token; afterwards `is_stopped` says whether it was the last one."""
        if token_id in self._stop_ids:
            pieces = self.close()
            self.is_stopped = True
            return pieces
        token = self._control.get(token_id)
        if token is None:
            return self._show(self._parser.feed(self._decoder.feed([token_id])))
        if token not in self._parser.tokens:
            return []
        pieces = self._show(self._parser.feed(self._decoder.flush()))
        self._decoder = StreamDecoder(self._tokenizer)  # a text begins anew behind a control token, as it was encoded
        return [*pieces, *self._show(self._parser.mark(token))]

    def close(self) -> list[Piece]:
        """The text that was held back, when no token follows."""
        pieces = self._show([*self._parser.feed(self._decoder.flush()), *self._parser.flush()])
        return pieces if self.is_stopped else [*pieces, *self._record("answer", self._stop.flush())]

    def _show(self, parts: Iterable[Part]) -> list[Piece]:
        pieces: list[Piece] = []
        for part in parts:
            if isinstance(part, ToolCall):
                if not self.is_stopped:
                    call_id = part.id or make_call_id(self._prompt_ids, len(self.tool_calls))
                    self.tool_calls.append(replace(part, id=call_id))
                continue
            kind, text = part
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
            text = text if self.text or self._is_text else text.lstrip("\n")
            self.text += text
        return [Piece(kind, text)] if text else []


def opens_thinking(tokenizer: Tokenizer, chat_format: ChatFormat, prompt_ids: Sequence[int]) -> bool:
    """Whether a prompt ends with the opening mark, as the templates of DeepSeek R1 and others do."""
    if chat_format.thinking is None:
        return False
    tail = list(prompt_ids[-_MAX_MARK_IDS:])
    mark_id = tokenizer.control_tokens.get(chat_format.thinking.open)
    if mark_id is None:
        return tokenizer.decode(tail).rstrip().endswith(chat_format.thinking.open)
    behind = tail[len(tail) - tail[::-1].index(mark_id) :] if mark_id in tail else None
    return behind is not None and not tokenizer.decode(behind).strip()


def _read_open_header(parser: SpeechParser, tokenizer: Tokenizer, prompt_ids: Sequence[int], start: str) -> None:
    """Tell the parser what the prompt has begun: a message's header, or with some clients its first words."""
    start_id = tokenizer.control_tokens[start]
    ids = list(prompt_ids)
    begun = ids[len(ids) - ids[::-1].index(start_id) :] if start_id in ids else []
    names = {index: token for token, index in tokenizer.control_tokens.items()}
    for index in begun:
        if names.get(index) in parser.tokens:
            parser.mark(names[index])
        else:
            parser.feed(tokenizer.decode([index]))


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
        num_held = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        rest, self._held = self._held, ""
        return rest
