"""Chat completions as clients read them: one object, or chunks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from openbook.engine.transcript import Piece
from openbook.server.errors import ApiError
from openbook.server.generation import Choice, ChoiceEvent, Generation
from openbook.server.logprobs import ChatLogprobs, prompt_logprobs
from openbook.server.schema_chat import ChatRequest
from openbook.server.served_model import Target
from openbook.server.streaming import DONE, sse
from openbook.tokenizer.tools import ToolCall


class ChatReply:
    """What a request is answered with.

    Args:
        body: what was asked.
        target: of whom.
        generation: what is said.
        max_calls: most calls of tools that are passed on; None: all.
    """

    def __init__(self, body: ChatRequest, target: Target, generation: Generation, max_calls: int | None) -> None:
        self.body, self.generation, self._max_calls = body, generation, max_calls
        self._target = target
        self._logprobs = ChatLogprobs(target.model.token_texts) if body.logprobs else None
        self._created_s = int(time.time())

    def head(self, kind: str) -> dict[str, Any]:
        """What stands in the object, and in every chunk."""
        return {
            "id": self.generation.requests[0].id,
            "object": kind,
            "created": self._created_s,
            "model": self._target.name,
            "system_fingerprint": self._target.model.fingerprint,
        }

    def note(self, event: ChoiceEvent) -> dict[str, Any] | None:
        """Take an event's log probabilities, if they are asked for: those that are certain now."""
        return self._logprobs.feed(event.choice.index, event.event) if self._logprobs else None

    def calls(self, choice: Choice) -> list[ToolCall]:
        """The calls of a choice that are passed on."""
        return choice.tool_calls[: self._max_calls]

    def ending(self, choice: Choice) -> dict[str, Any]:
        """What a choice has at its end: the reason, and its receipt if one was asked for."""
        reason = "tool_calls" if choice.tool_calls and choice.finish_reason == "stop" else choice.finish_reason
        receipt = {} if choice.receipt is None else {"receipt": choice.receipt}
        return {"finish_reason": reason, **receipt}

    def completion(self) -> dict[str, Any]:
        """The one object, when everything is said."""
        choices = [self._choice(choice) for choice in self.generation.choices]
        return {**self.head("chat.completion"), "choices": choices, "usage": self.generation.usage.to_openai()}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        calls = self.calls(choice)
        reasoning = choice.reasoning or None
        message: dict[str, Any] = {
            "role": "assistant",
            "content": choice.text or (None if calls else ""),
            "refusal": None,
            "reasoning_content": reasoning,
            "reasoning": reasoning,
        }
        if calls:
            message["tool_calls"] = [call.to_openai() for call in calls]
        value: dict[str, Any] = {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs.all(choice.index) if self._logprobs else None,
            **self.ending(choice),
        }
        if self.body.prompt_logprobs is not None:
            texts = self._target.model.token_texts
            value["prompt_logprobs"] = prompt_logprobs(texts, choice.prompt_logprobs or [])
        return value


class ChatChunks:
    """The events of a streamed chat completion; see `EventEncoder`."""

    def __init__(self, reply: ChatReply) -> None:
        options = reply.body.stream_options
        self._reply = reply
        self._has_usage = bool(options and options.include_usage)
        self._head = reply.head("chat.completion.chunk")
        if self._has_usage:
            self._head["usage"] = None
        self._num_calls: dict[int, int] = {}

    def begin(self) -> Iterator[bytes]:
        """Each choice's role."""
        for choice in self._reply.generation.choices:
            yield self._chunk(choice, {"role": "assistant", "content": ""})

    def event(self, event: ChoiceEvent) -> Iterator[bytes]:
        """New text and calls, then the end."""
        choice = event.choice
        deltas = [*map(_delta, _merged(event.event.pieces)), *self._call_deltas(choice)]
        logprobs = self._reply.note(event)
        for number, delta in enumerate(deltas, 1):
            yield self._chunk(choice, delta, logprobs if number == len(deltas) else None)
        if choice.finish_reason is not None:
            ending = self._reply.ending(choice)
            yield self._chunk(choice, {}, None if deltas else logprobs, ending)

    def end(self) -> Iterator[bytes]:
        """The usage, if it was asked for."""
        if self._has_usage:
            yield sse({**self._head, "choices": [], "usage": self._reply.generation.usage.to_openai()})
        yield DONE

    def error(self, error: ApiError) -> Iterator[bytes]:
        """The error as an event."""
        yield sse(error.body())
        yield DONE

    def _call_deltas(self, choice: Choice) -> Iterator[dict[str, Any]]:
        calls, sent = self._reply.calls(choice), self._num_calls.get(choice.index, 0)
        for index in range(sent, len(calls)):
            yield {"tool_calls": [{"index": index, **calls[index].to_openai()}]}
        self._num_calls[choice.index] = len(calls)

    def _chunk(
        self,
        choice: Choice,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        ending: dict[str, Any] | None = None,
    ) -> bytes:
        value = {"index": choice.index, "delta": delta, "logprobs": logprobs, **(ending or {"finish_reason": None})}
        return sse({**self._head, "choices": [value]})


def _delta(piece: Piece) -> dict[str, Any]:
    if piece.kind == "reasoning":
        return {"reasoning_content": piece.text, "reasoning": piece.text}
    return {"content": piece.text}


def _merged(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Neighbours of one kind as one."""
    last: Piece | None = None
    for piece in pieces:
        if last is not None and piece.kind == last.kind:
            last = Piece(last.kind, last.text + piece.text)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last
