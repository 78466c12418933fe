"""The engine in a thread of this process, behind an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from openbook.core.errors import UserError
from openbook.engine.client import EngineDownError, EngineFullError
from openbook.engine.events import EngineStats, SequenceEvent
from openbook.engine.request import Request

if TYPE_CHECKING:
    from openbook.engine.engine import Engine


class AdapterStore(Protocol):
    """Loads adapters into a runner."""

    @property
    def names(self) -> list[str]:
        """Those that a request may ask for."""

    def read(self, name: str, path: str) -> Any:
        """Read and check an adapter; called from any thread."""

    def add(self, adapter: Any) -> None:
        """Let sequences use it from the next step on."""

    def retire(self, name: str) -> None:
        """Let no new request use it."""

    def remove(self, name: str) -> None:
        """Free what it takes."""


class LocalEngine:
    """See `EngineClient`. The thread starts with the first request.

    Args:
        engine: what computes; nobody else may call it once there was a request.
        adapters: loads and unloads adapters; None where the model takes none.
    """

    def __init__(self, engine: Engine, adapters: AdapterStore | None = None) -> None:
        self.engine, self._store = engine, adapters
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closing = False
        self._queues: dict[str, asyncio.Queue[SequenceEvent]] = {}
        self._embeddings: set[asyncio.Future[NDArray[np.float32]]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def max_model_len(self) -> int:
        """Most tokens of one sequence, prompt and answer together."""
        return self.engine.max_model_len

    async def submit(self, request: Request) -> AsyncIterator[SequenceEvent]:
        """See `EngineClient.submit`."""
        if request.id in self._queues:
            raise UserError(f"a request with the id {request.id!r} is running: give each its own")
        settings = self.engine.settings
        if self._is_closing or len(self._queues) >= settings.max_running + settings.max_waiting:
            raise EngineFullError(self.engine.num_waiting, retry_after_s=self._seconds_a_request())
        # A grammar takes a while to compile, in which others may be served.
        is_slow = request.params.constraint is not None or bool(request.images)
        prepare = self.engine.prepare
        sequence = await asyncio.to_thread(prepare, request) if is_slow else prepare(request)
        self._require_adapter(request.adapter)
        if self._is_closing:  # meanwhile
            raise EngineFullError(self.engine.num_waiting, retry_after_s=self._seconds_a_request())
        queue: asyncio.Queue[SequenceEvent] = asyncio.Queue()
        self._queues[request.id] = queue
        num_running = request.num_samples
        try:
            self._do(lambda: self.engine.add(sequence))
            while num_running:
                event = await queue.get()
                num_running -= event.finish_reason is not None
                yield event
        finally:
            del self._queues[request.id]
            if num_running:
                self._do(lambda: self._drop(request.id))

    async def embed(self, prompts: Sequence[Sequence[int]], adapter: str | None = None) -> NDArray[np.float32]:
        """See `EngineClient.embed`."""
        if self._is_closing or len(self._embeddings) >= self.engine.settings.max_waiting:
            raise EngineFullError(len(self._embeddings), retry_after_s=self._seconds_a_request())
        job = self.engine.prepare_embedding(prompts, adapter)
        self._require_adapter(adapter)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[NDArray[np.float32]] = loop.create_future()

        def end() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, future, job.result, job.error)

        job.on_end = end
        self._embeddings.add(future)
        try:
            self._do(lambda: self.engine.embed(job))
            return await future
        finally:
            self._embeddings.discard(future)
            if not job.is_over:
                self._do(lambda: self.engine.drop_embedding(job))

    async def stats(self) -> EngineStats:
        """See `EngineClient.stats`."""
        return self.engine.stats()

    @property
    def adapters(self) -> list[str]:
        """See `EngineClient.adapters`."""
        return [] if self._store is None else self._store.names

    async def load_adapter(self, name: str, path: str) -> None:
        """See `EngineClient.load_adapter`."""
        if self._store is None:
            raise UserError("this model takes no adapters: serve one whose family does")
        store = self._store
        ready = await asyncio.to_thread(store.read, name, path)
        await self._result(lambda: store.add(ready))

    async def unload_adapter(self, name: str) -> None:
        """See `EngineClient.unload_adapter`."""
        if name not in self.adapters or self._store is None:
            raise UserError(f"the adapter {name!r} is not loaded: expected one of {', '.join(self.adapters) or 'none'}")
        store = self._store
        store.retire(name)  # no request may begin with it any more
        while await self._result(lambda: self.engine.uses_adapter(name)):
            await asyncio.sleep(0.05)

        def remove() -> None:
            store.remove(name)
            self.engine.forget_prefixes()

        await self._result(remove)

    async def close(self, deadline_s: float) -> None:
        """See `EngineClient.close`."""
        self._is_closing = True
        end_s = time.monotonic() + deadline_s
        while (self._queues or self._embeddings) and time.monotonic() < end_s:
            await asyncio.sleep(0.02)
        for future in self._embeddings:
            _settle(future, None, EngineDownError("the engine is closed", retry_after_s=5))
        for request_id in list(self._queues):
            self._do(lambda request_id=request_id: self._end(request_id))  # type: ignore[misc]
        while (self._queues or self._embeddings) and time.monotonic() < end_s + 1.0:  # their readers see the last event
            await asyncio.sleep(0.01)
        thread = self._thread
        if thread is not None:
            self._do(self._stop)
            await asyncio.to_thread(thread.join)

    def _require_adapter(self, name: str | None) -> None:
        if name is not None and name not in self.adapters:
            raise UserError(f"the adapter {name!r} is not loaded: load it, or use the model as it is")

    async def _result(self, work: Callable[[], Any]) -> Any:
        """What `work` gives, done between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def run() -> None:
            try:
                value, error = work(), None
            except Exception as failure:
                value, error = None, failure
            loop.call_soon_threadsafe(_settle, future, value, error)

        self._do(run)
        return await future

    def _do(self, command: Callable[[], None]) -> None:
        """Let the thread do something between two steps."""
        self._loop = asyncio.get_running_loop()
        with self._wake:
            self._commands.append(command)
            self._wake.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="openbook-engine", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        self._is_stopped = False
        while not self._is_stopped:
            with self._wake:
                while not self._commands and not self.engine.has_work:
                    self._wake.wait()
                commands, self._commands = self._commands, deque()
            for command in commands:
                command()
            events = self.engine.step()
            if events:
                self._send(events)

    def _stop(self) -> None:
        self._is_stopped = True

    def _drop(self, request_id: str) -> None:
        self.engine.cancel(request_id)

    def _end(self, request_id: str) -> None:
        self._send(self.engine.cancel(request_id))

    def _send(self, events: list[SequenceEvent]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: list[SequenceEvent]) -> None:
        for event in events:
            queue = self._queues.get(event.request_id)
            if queue is not None:  # else nobody waits for it any more
                queue.put_nowait(event)

    def _seconds_a_request(self) -> int:
        stats = self.engine.stats()
        rate = stats.num_new_tokens / stats.step_s if stats.step_s else 0.0
        return 1 if rate == 0 else max(1, min(60, round(100 / rate)))


def _settle(future: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if future.done():  # nobody waits any more, or it was told that there will be no result
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)
