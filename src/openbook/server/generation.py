"""From requests to the engine to their events: what every endpoint that answers shares.

    generation = Generation(model, requests, metrics, account)
    await generation.begin()                  # errors that deserve a status of their own are raised here
    async for event in generation: ...        # `event.choice` holds what was said so far
    generation.choices, generation.usage
    await generation.close()                  # always, in a `finally`: cancels what is still running

`openbook.server.streaming` does this for an HTTP response, and closes it when the client leaves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, cast

from openbook.core.errors import UserError
from openbook.engine.events import SequenceEvent, TokenLogprob
from openbook.engine.request import FinishReason, Request, SamplingParams
from openbook.server.errors import ApiError, as_api_error, server_error
from openbook.server.limits import Account
from openbook.server.metrics import Metrics
from openbook.server.served_model import ServedModel
from openbook.tokenizer.tools import ToolCall

_QUEUED_EVENTS = 64  # read ahead of a slow client; the engine keeps the rest until the client is given up
# What the engine's errors begin with, and the parameter that is wrong then.
_PARAMS = {name: name for name in ("n", "stop_token_ids", *(parameter.name for parameter in fields(SamplingParams)))}
_CONSTRAINTS = ("the JSON schema", "the regular expression", "the list of choices", "the Lark grammar")
_log = logging.getLogger("openbook.server")


@dataclass(kw_only=True)
class Choice:
    """What one sequence has said so far.

    Args:
        index: counted over all requests of a generation: first all samples of the first prompt.
        request: what it continues.
    """

    index: int
    request: Request
    token_ids: list[int] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None
    cached_tokens: int = 0
    num_reasoning_tokens: int = 0  # those before the answer's first, the marks of thinking included
    finish_reason: FinishReason | None = None
    error: str | None = None
    # Enough to recompute the answer; set when it is complete, and sent along where it is not None.
    receipt: dict[str, Any] | None = None
    _texts: list[str] = field(default_factory=list)
    _thoughts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The answer, without the thinking before it."""
        return "".join(self._texts)

    @property
    def reasoning(self) -> str:
        """The thinking."""
        return "".join(self._thoughts)

    @property
    def has_answer(self) -> bool:
        """Whether anything but thinking has come."""
        return bool(self._texts or self.tool_calls)

    def add(self, event: SequenceEvent) -> None:
        """Take over what an event brings."""
        had_answer = self.has_answer
        self.token_ids += event.token_ids
        self.tool_calls += event.tool_calls
        self.logprobs += event.logprobs
        self.prompt_logprobs = self.prompt_logprobs or event.prompt_logprobs
        self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        for piece in event.pieces:
            (self._texts if piece.kind == "answer" else self._thoughts).append(piece.text)
        if not had_answer and self._thoughts:
            # An event of several tokens may hold the end of the thinking: its tokens count as answer.
            self.num_reasoning_tokens = len(self.token_ids) - (len(event.token_ids) if self.has_answer else 0)
        self.finish_reason, self.error = event.finish_reason, event.error


class ChoiceEvent(NamedTuple):
    """One step of one choice, which holds it already."""

    choice: Choice
    event: SequenceEvent


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts over all choices; each prompt counts once, however many choices continue it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int

    def to_openai(self) -> dict[str, Any]:
        """As `usage` in chat and text completions."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


class Generation:
    """Requests to one model that belong to one answer.

    Args:
        requests: each with an `id` of its own.
        account: pays for the tokens; None: nobody counts them.
        began_s: when the client asked, on the clock `time.monotonic`.
        prompt_param: the parameter that an error about the prompt names.
        constraint_param: the one that an error about what the answer must obey names.
        has_receipts: whether each complete answer gets its receipt.
    """

    def __init__(
        self,
        model: ServedModel,
        requests: Sequence[Request],
        metrics: Metrics,
        account: Account | None = None,
        began_s: float | None = None,
        prompt_param: str = "messages",
        constraint_param: str | None = None,
        has_receipts: bool = False,
    ) -> None:
        self.model, self.requests = model, requests
        self.choices: list[Choice] = []
        self._account, self._prompt_param = account, prompt_param
        self._metrics, self._sequences = metrics.of(model.name), metrics.finished
        self._has_receipts = has_receipts
        self._params = {**_PARAMS, "prompt": prompt_param}
        if constraint_param is not None:
            self._params |= dict.fromkeys(_CONSTRAINTS, constraint_param)
        self._began_s = time.monotonic() if began_s is None else began_s
        self._last_s: dict[int, float] = {}  # when each choice's latest token came
        self._queue: asyncio.Queue[tuple[int, SequenceEvent] | Exception] = asyncio.Queue(_QUEUED_EVENTS)
        self._pumps: list[asyncio.Task[None]] = []
        self._first: tuple[int, SequenceEvent] | None = None
        for request in requests:
            for _ in range(request.num_samples):
                self.choices.append(Choice(index=len(self.choices), request=request))
        self._num_open = len(self.choices)
        self._has_failed = False

    async def begin(self, timeout_s: float | None = None) -> None:
        """Submit the requests, and wait for the first event, or so long.

        Raises:
            ApiError: the prompt does not fit, something in the request is unknown, the queue is full, or the key has
                used its tokens.
        """
        num_prompt_tokens = sum(len(request.prompt_ids) for request in self.requests)
        for request in self.requests:
            try:
                request.num_new_tokens(self.model.max_model_len)
            except UserError as error:
                code = "context_length_exceeded" if request.prompt_ids else None
                raise ApiError(400, str(error), param=self._prompt_param, code=code) from error
        if self._account is not None:
            self._account.admit_prompt(num_prompt_tokens)
        first = 0
        for request in self.requests:
            self._pumps.append(asyncio.create_task(self._pump(first, request)))
            first += request.num_samples
        try:
            self._first = await self._take(timeout_s)
        except ApiError:
            if self._account is not None:
                self._account.spend_tokens(-num_prompt_tokens)
            raise
        self._metrics.prompt_tokens.inc(num_prompt_tokens)

    async def __aiter__(self) -> AsyncIterator[ChoiceEvent]:
        while (event := await self.next_event()) is not None:
            yield event

    @property
    def is_over(self) -> bool:
        """Whether every choice has come to its end."""
        return not self._num_open

    @property
    def has_ready(self) -> bool:
        """Whether the next event need not be waited for."""
        return self._first is not None or not self._queue.empty()

    async def next_event(self, timeout_s: float | None = None) -> ChoiceEvent | None:
        """The next step of any choice; None at the end (see `is_over`), or if none comes within so many seconds.

        Raises:
            ApiError: a sequence failed, or the server stops.
        """
        if self.is_over:
            return None
        taken, self._first = self._first or await self._take(timeout_s), None
        if taken is None:
            return None
        index, event = taken
        choice = self.choices[index]
        choice.add(event)
        self._record(choice, event)
        self._has_failed |= event.finish_reason in ("error", "cancelled")
        if event.finish_reason == "error":
            raise ApiError(500, event.error or "the sequence failed: try again", code="generation_failed")
        if event.finish_reason == "cancelled":
            raise ApiError(503, "the server stops: ask again in a moment", code="shutting_down", retry_after_s=5)
        if event.finish_reason is not None and self._has_receipts:
            choice.receipt = await self._receipt(choice, event)
        return ChoiceEvent(choice, event)

    async def close(self) -> None:
        """Cancel what is still running; at once in the engine."""
        if not (self.is_over or self._has_failed) and self._pumps:
            self._metrics.cancelled.inc()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    @property
    def usage(self) -> Usage:
        """What it took so far."""
        first_of = {id(choice.request): choice for choice in reversed(self.choices)}
        return Usage(
            prompt_tokens=sum(len(request.prompt_ids) for request in self.requests),
            completion_tokens=sum(len(choice.token_ids) for choice in self.choices),
            cached_tokens=sum(choice.cached_tokens for choice in first_of.values()),
            reasoning_tokens=sum(choice.num_reasoning_tokens for choice in self.choices),
        )

    async def _receipt(self, choice: Choice, event: SequenceEvent) -> dict[str, Any] | None:
        maker, reason = self.model.receipts, event.finish_reason
        if maker is None or reason is None:
            return None
        # In a thread: the first one of a model reads all its files.
        receipt = await asyncio.to_thread(maker.make, choice.request, event.index, choice.token_ids, reason)
        return None if receipt is None else receipt.to_json()

    async def _pump(self, first: int, request: Request) -> None:
        num_open = request.num_samples
        try:
            # The protocol speaks of an iterator that can be closed, which is a generator.
            events = cast("AsyncGenerator[SequenceEvent, None]", self.model.engine.submit(request))
            async with aclosing(events):
                async for event in events:
                    num_open -= event.finish_reason is not None
                    await self._queue.put((first + event.index, event))
            if num_open:
                raise RuntimeError(f"the engine left {num_open} sequences without an end")
        except Exception as error:
            await self._queue.put(error)

    async def _take(self, timeout_s: float | None) -> tuple[int, SequenceEvent] | None:
        try:
            taken = self._queue.get_nowait()
        except asyncio.QueueEmpty:
            try:
                async with asyncio.timeout(timeout_s):
                    taken = await self._queue.get()
            except TimeoutError:
                return None
        if not isinstance(taken, Exception):
            return taken
        self._has_failed = True
        known = as_api_error(taken, self._params)
        if known is None:
            _log.error("the engine failed on %s", self.requests[0].id, exc_info=taken)
            known = server_error()
        raise known from taken

    def _record(self, choice: Choice, event: SequenceEvent) -> None:
        """Count and time an event."""
        now_s = time.monotonic()
        if num_tokens := len(event.token_ids):
            before_s = self._last_s.get(choice.index)
            if before_s is None:
                self._metrics.first_token_s.observe(now_s - self._began_s)
            else:
                self._metrics.between_tokens_s.observe((now_s - before_s) / num_tokens)
            self._last_s[choice.index] = now_s
            self._metrics.answer_tokens.inc(num_tokens)
            if self._account is not None:
                self._account.spend_tokens(num_tokens)
        if event.finish_reason is not None:
            self._num_open -= 1
            self._sequences.labels(self.model.name, event.finish_reason).inc()
            if self.is_over:
                self._metrics.total_s.observe(now_s - self._began_s)
