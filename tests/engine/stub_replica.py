"""An engine for tests that says what it is told to, in steps that the test takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from openbook.core.errors import UserError
from openbook.engine.client import EngineDownError, EngineFullError
from openbook.engine.events import EngineStats, SequenceEvent
from openbook.engine.remote_engine import NO_STATS
from openbook.engine.request import Request, SamplingParams


class StubReplica:
    """A replica; requests wait in `queues` for their events, put there by `say`.

    refusal: what `submit` raises.
    """

    def __init__(self) -> None:
        self.is_up, self.num_starts, self.num_blocks, self.max_model_len = True, 1, 64, 512
        self.refusal: Exception | None = None
        self.queues: dict[str, asyncio.Queue[SequenceEvent | Exception]] = {}
        self.seen: list[str] = []  # ids of all requests that came
        self.cancelled: list[str] = []
        self.loaded: dict[str, str] = {}
        self.adapter_error: Exception | None = None
        self.current = NO_STATS
        self.closed_s: float | None = None

    async def submit(self, request: Request) -> AsyncIterator[SequenceEvent]:
        self.seen.append(request.id)
        if self.refusal is not None:
            raise self.refusal
        queue = self.queues[request.id] = asyncio.Queue()
        num_open = request.num_samples
        try:
            while num_open:
                event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                num_open -= event.finish_reason is not None
                yield event
        finally:
            del self.queues[request.id]
            if num_open:
                self.cancelled.append(request.id)

    def say(self, name: str, token_id: int = 0, *, is_last: bool = False, index: int = 0) -> None:
        """One more token of a request."""
        reason = "stop" if is_last else None
        event = SequenceEvent(request_id=name, index=index, token_ids=[token_id], finish_reason=reason)
        self.queues[name].put_nowait(event)

    def fail(self, name: str, error: Exception) -> None:
        """Let `submit` raise."""
        self.queues[name].put_nowait(error)

    async def stats(self) -> EngineStats:
        return self.current

    @property
    def adapters(self) -> list[str]:
        return list(self.loaded)

    async def load_adapter(self, name: str, path: str) -> None:
        if self.adapter_error is not None:
            raise self.adapter_error
        self.loaded[name] = path

    async def unload_adapter(self, name: str) -> None:
        if name not in self.loaded:
            raise UserError(f"the adapter {name!r} is not loaded")
        del self.loaded[name]

    async def close(self, deadline_s: float) -> None:
        self.closed_s = deadline_s


def asked(name: str, prompt_ids: list[int], **changes: object) -> Request:
    """A request with that id."""
    return Request(prompt_ids=prompt_ids, params=SamplingParams(), id=name, **changes)  # type: ignore[arg-type]


def full() -> EngineFullError:
    """A queue that is full."""
    return EngineFullError(7, 3)


def down() -> EngineDownError:
    """An engine that has ended with the request."""
    return EngineDownError("engine process 1 was killed by SIGKILL", 1)
