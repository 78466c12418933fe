"""Responses as clients read them: one object, or events."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from openbook.engine.request import SamplingParams
from openbook.server.errors import ApiError
from openbook.server.generation import ChoiceEvent, Generation
from openbook.server.logprobs import ChatLogprobs
from openbook.server.response_output import Event, OutputBuilder
from openbook.server.schema_responses import ResponseRequest
from openbook.server.served_model import Target
from openbook.server.streaming import sse

_ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


class RecordedGeneration(Generation):
    """A generation that somebody writes down, and keeps before its end is told.

    on_step: sees each step.
    on_end: is waited for behind the last one; what it raises is how the generation ends.
    """

    on_step: Callable[[ChoiceEvent], None]
    on_end: Callable[[], Awaitable[None]]

    async def next_event(self, timeout_s: float | None = None) -> ChoiceEvent | None:
        """See `Generation.next_event`."""
        event = await super().next_event(timeout_s)
        if event is not None:
            self.on_step(event)
            if self.is_over:
                await self.on_end()
        return event


class ResponseReply:
    """What a request is answered with.

    Args:
        body: what was asked.
        target: of whom.
        generation: what is said.
        params: how tokens are chosen.
        max_calls: most calls of tools that are passed on; None: all.
        is_stored: whether it is kept.
    """

    def __init__(
        self,
        body: ResponseRequest,
        target: Target,
        generation: Generation,
        params: SamplingParams,
        max_calls: int | None,
        is_stored: bool,
    ) -> None:
        self._body, self._target, self._generation, self._params = body, target, generation, params
        self._max_calls, self._is_stored = max_calls, is_stored
        self._logprobs = ChatLogprobs(target.model.token_texts) if params.num_logprobs is not None else None
        self._output = OutputBuilder()
        self._created_s = int(time.time())
        self._num_calls = 0
        self.id = generation.requests[0].id
        self.events: list[Event] = []  # those of the latest step
        self.final: dict[str, Any] = {}  # the object, once everything is said

    def note(self, event: ChoiceEvent) -> None:
        """Take one step into account."""
        choice, step = event
        new = self._logprobs.feed(choice.index, step) if self._logprobs else None
        calls = choice.tool_calls[self._num_calls : self._max_calls]
        self._num_calls = len(choice.tool_calls)
        self.events = self._output.add(step.pieces, calls, new["content"] if new else ())
        if choice.finish_reason is not None:
            self.events += self._output.end(choice.finish_reason)
            is_cut = choice.finish_reason == "length"
            self.final = {
                **self.response("incomplete" if is_cut else "completed"),
                "completed_at": None if is_cut else int(time.time()),
                "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
                "usage": self._usage(),
                **({} if choice.receipt is None else {"receipt": choice.receipt}),
            }

    def failed(self, error: ApiError) -> dict[str, Any]:
        """The object of a response that came to no end."""
        code = _ERROR_CODES.get(error.status_code, "server_error")
        return {**self.response("failed"), "error": {"code": code, "message": error.detail}}

    def response(self, status: str) -> dict[str, Any]:
        """The object as far as it is known."""
        body = self._body
        reasoning, text = body.reasoning, body.text
        tool_choice = body.tool_choice or "auto"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created_s,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._target.name,
            "output": list(self._output.items),
            "usage": None,
            "instructions": body.instructions,
            "previous_response_id": body.previous_response_id,
            "store": self._is_stored,
            "background": False,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": (reasoning and reasoning.effort) or "medium", "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "temperature": self._params.temperature,
            "text": {
                "format": text.format.model_dump(by_alias=True) if text and text.format else {"type": "text"},
                "verbosity": "medium",
            },
            "tool_choice": tool_choice if isinstance(tool_choice, str) else tool_choice.model_dump(),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_logprobs": self._params.num_logprobs or 0,
            "top_p": self._params.top_p,
            "truncation": "disabled",
            "user": body.user,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._generation.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.cached_tokens,
                "cache_write_tokens": usage.prompt_tokens - usage.cached_tokens,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


class ResponseEvents:
    """The events of a streamed response; see `EventEncoder`."""

    def __init__(self, reply: ResponseReply) -> None:
        self._reply = reply
        self._number = 0

    def begin(self) -> Iterator[bytes]:
        """That it has begun."""
        for kind in ("response.created", "response.in_progress"):
            yield self._encode({"type": kind, "response": self._reply.response("in_progress")})

    def event(self, event: ChoiceEvent) -> Iterator[bytes]:
        """What a step brought, which the reply has noted already."""
        for one in self._reply.events:
            yield self._encode(one)

    def end(self) -> Iterator[bytes]:
        """The whole response."""
        final = self._reply.final
        yield self._encode({"type": f"response.{final['status']}", "response": final})

    def error(self, error: ApiError) -> Iterator[bytes]:
        """That it failed, and how far it came."""
        yield self._encode({"type": "response.failed", "response": self._reply.failed(error)})

    def _encode(self, event: Event) -> bytes:
        number, self._number = self._number, self._number + 1
        return sse({**event, "sequence_number": number}, event["type"])
