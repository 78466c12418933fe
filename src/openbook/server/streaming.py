"""Generations as HTTP responses: whole, or as server-sent events; both end at once when the client leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, Protocol, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from openbook.server.errors import CLIENT_GONE, ApiError, server_error
from openbook.server.generation import ChoiceEvent, Generation

# A stream begins when its first event is there, so that an error has a status; but not later than this, as proxies
# give up on silence.
_SILENCE_S = 10.0
_KEEP_ALIVE = b": still working\n\n"  # a comment, which clients skip
DONE = b"data: [DONE]\n\n"
_log = logging.getLogger("openbook.server")
_encode = msgspec.json.Encoder().encode
T = TypeVar("T")


class EventEncoder(Protocol):
    """Writes a generation in one endpoint's events, each ready to be sent (see `sse`)."""

    def begin(self) -> Iterable[bytes]:
        """What stands before the first event."""

    def event(self, event: ChoiceEvent) -> Iterable[bytes]:
        """One step of one choice."""

    def end(self) -> Iterable[bytes]:
        """What follows the last event of the last choice."""

    def error(self, error: ApiError) -> Iterable[bytes]:
        """What ends a stream that failed."""


def sse(value: Any, event: str | None = None) -> bytes:
    """One server-sent event with a JSON value; `event` is its type, where the endpoint has types."""
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    return head + b"data: " + _encode(value) + b"\n\n"


async def stream(request: Request, generation: Generation, encoder: EventEncoder) -> Response:
    """The response that sends a generation as it comes, and closes it at its end.

    Raises:
        ApiError: as `Generation.begin`; or the client left before the first event.
    """
    try:
        await until_gone(request, generation.begin(_SILENCE_S))
    except BaseException:
        await generation.close()
        raise
    return _GenerationResponse(generation, encoder)


async def finish(
    request: Request, generation: Generation, on_event: Callable[[ChoiceEvent], object] | None = None
) -> None:
    """Run a generation to its end and close it; `on_event` sees each step.

    Raises:
        ApiError: as `Generation.begin` and `Generation.finish`; or the client left.
    """
    try:
        await until_gone(request, _run(generation, on_event))
    finally:
        await generation.close()


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it is cancelled as soon as the client has left.

    The request's body must have been read.

    Raises:
        ApiError: the client left.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(CLIENT_GONE, "the client left before its answer was there")
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class _GenerationResponse(StreamingResponse):
    """Starlette cancels the sending when the client leaves; then, as at the end, the generation is closed."""

    def __init__(self, generation: Generation, encoder: EventEncoder) -> None:
        headers = {"x-accel-buffering": "no"}  # nginx would hold events back
        super().__init__(_chunks(generation, encoder), media_type="text/event-stream", headers=headers)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._generation.close()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _run(generation: Generation, on_event: Callable[[ChoiceEvent], object] | None) -> None:
    await generation.begin()
    async for event in generation:
        if on_event is not None:
            on_event(event)


async def _chunks(generation: Generation, encoder: EventEncoder) -> AsyncIterator[bytes]:
    """The body of a stream; what is there at the same time is sent together."""
    parts = [*encoder.begin()]
    try:
        while not generation.is_over:
            if parts and not generation.has_ready:
                yield b"".join(parts)
                parts.clear()
            event = await generation.next_event(_SILENCE_S)
            parts += [_KEEP_ALIVE] if event is None else encoder.event(event)
        parts += encoder.end()
    except ApiError as error:
        parts += encoder.error(error)
    except Exception:
        _log.exception("a stream failed")
        parts += encoder.error(server_error())
    yield b"".join(parts)
