"""An engine that computes elsewhere, behind a link that carries messages; it is started again when it ends.

`ProcessEngine` links to a process of this machine, the replicas on a Ray cluster are behind another kind of link.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from openbook.core.errors import UserError
from openbook.engine.client import EngineDownError, EngineFullError
from openbook.engine.events import EngineStats, SequenceEvent
from openbook.engine.request import FinishReason, Request
from openbook.engine.wire import (
    AskStats,
    Cancel,
    Close,
    Done,
    Embed,
    Events,
    FromWorker,
    LoadAdapter,
    Message,
    Ready,
    Submit,
    UnloadAdapter,
    WorkerBugError,
    as_error,
    decode_from_worker,
    encode,
)

_FIRST_DELAY_S, _MOST_DELAY_S = 1.0, 30.0  # before an engine that ended soon after its start is started again
_HEALTHY_S = 60.0  # one that ran so long is started again at once
_GRACE_S = 5.0  # beyond the deadline, for an engine to end by itself

# What of the statistics is counted from the start; the rest says how things are now.
_GAUGES = ("num_running", "num_waiting", "num_blocks", "num_free_blocks")
NO_STATS = EngineStats(**{field.name: 0 for field in fields(EngineStats)})

_log = logging.getLogger("openbook.engine")


class LinkLostError(Exception):
    """There is nobody at the other end any more; the text says what happened to it."""


class Link(Protocol):
    """Carries messages to one run of an engine, and back."""

    @property
    def ready(self) -> Ready:
        """What the engine said when it had started."""

    def send(self, data: bytes) -> None:
        """Send a message, after those before it; if the other end is gone, nothing happens."""

    async def receive(self) -> bytes:
        """The next message.

        Raises:
            LinkLostError: there will be none any more.
        """

    def cut(self) -> None:
        """End the engine now, if it has not ended; `receive` then raises."""


def add_stats(first: EngineStats, second: EngineStats) -> EngineStats:
    """The sum of each number."""
    names = [one.name for one in fields(EngineStats)]
    return EngineStats(**{name: getattr(first, name) + getattr(second, name) for name in names})


@dataclass(eq=False)
class _Running:
    """A request whose last event has not come: its sequences that go on, and what its reader has not read."""

    request: Request
    open: set[int] = field(default_factory=set)
    queue: asyncio.Queue[SequenceEvent | Exception] = field(default_factory=asyncio.Queue)
    is_begun: bool = False

    def __post_init__(self) -> None:
        self.open = set(range(self.request.num_samples))

    def add(self, event: SequenceEvent) -> None:
        self.is_begun = True
        if event.finish_reason is not None:
            self.open.discard(event.index)
        self.queue.put_nowait(event)

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """No event comes any more: the last one of each sequence that has none."""
        for index in sorted(self.open):
            self.add(SequenceEvent(request_id=self.request.id, index=index, finish_reason=reason, error=error))


class RemoteEngine(ABC):
    """See `EngineClient`.

    Args:
        name: for the log.
        link: to an engine that has started.
    """

    def __init__(self, name: str, link: Link) -> None:
        self.name, self._link = name, link
        self.profile, self.max_model_len = link.ready.profile, link.ready.max_model_len
        self.num_blocks = link.ready.num_blocks  # of its cache
        self.num_starts = 1  # each begins with an empty cache
        self._adapters: dict[str, str | None] = dict.fromkeys(link.ready.adapters)  # path, if loaded since the start
        self._numbers = itertools.count(1)
        self._running: dict[int, _Running] = {}
        self._answers: dict[int, asyncio.Future[Done]] = {}
        self._is_up, self._is_closing = True, False
        self._past = self._latest = NO_STATS  # of runs that have ended; of this run, when it was last asked
        self._delay_s = 0.0
        self._keeper: asyncio.Task[None] | None = None

    @abstractmethod
    async def _connect(self) -> Link:
        """Start the engine again; may be cancelled.

        Raises:
            LinkLostError, UserError, WorkerBugError: it did not start.
        """

    @property
    def is_up(self) -> bool:
        """Whether it takes requests now."""
        return self._is_up and not self._is_closing

    @property
    def adapters(self) -> list[str]:
        """See `EngineClient.adapters`."""
        return list(self._adapters)

    async def submit(self, request: Request) -> AsyncIterator[SequenceEvent]:
        """See `EngineClient.submit`.

        Raises:
            EngineDownError: before the first event, the engine has ended. If it ends later, each sequence ends with the
                finish reason "error".
        """
        self._require_up()
        number, running = next(self._numbers), _Running(request)
        try:
            data = encode(Submit(number, request))
        except (UnicodeEncodeError, OverflowError) as error:
            raise UserError(f"the request cannot be passed on to its engine: {error}; correct that value") from error
        link = self._link
        self._running[number] = running
        try:
            link.send(data)
            num_open = request.num_samples
            while num_open:
                event = await running.queue.get()
                if isinstance(event, Exception):
                    raise event
                num_open -= event.finish_reason is not None
                yield event
        finally:
            del self._running[number]
            if running.open:
                link.send(encode(Cancel(number)))

    async def embed(self, prompts: Sequence[Sequence[int]], adapter: str | None = None) -> NDArray[np.float32]:
        """See `EngineClient.embed`.

        Raises:
            EngineDownError: the engine has ended.
        """
        given = [list(prompt) for prompt in prompts]
        try:
            done = await self._ask(lambda number: Embed(number, given, adapter))
        except (UnicodeEncodeError, OverflowError) as error:
            raise UserError(f"the prompts cannot be passed on to their engine: {error}; correct them") from error
        assert done.embeddings is not None
        return done.embeddings

    async def stats(self) -> EngineStats:
        """See `EngineClient.stats`; of an engine that is down, what it had done when it was last asked."""
        if self.is_up:
            try:
                self._latest = (await self._ask(lambda number: AskStats(number))).stats or NO_STATS
            except EngineDownError:
                return self._past
        return add_stats(self._past, self._latest)

    async def load_adapter(self, name: str, path: str) -> None:
        """See `EngineClient.load_adapter`. An engine that is started again loads it again.

        Raises:
            EngineDownError: it is being started again.
        """
        where = str(Path(path).expanduser().absolute())
        await self._ask(lambda number: LoadAdapter(number, name, where))
        self._adapters[name] = where

    async def unload_adapter(self, name: str) -> None:
        """See `EngineClient.unload_adapter`.

        Raises:
            EngineDownError: it is being started again.
        """
        await self._ask(lambda number: UnloadAdapter(number, name))
        self._adapters.pop(name, None)

    async def close(self, deadline_s: float) -> None:
        """See `EngineClient.close`; then the engine is ended."""
        self._is_closing = True
        if self._is_up:
            self._keep()
            self._link.send(encode(Close(deadline_s)))
            assert self._keeper is not None
            await asyncio.wait([self._keeper], timeout=deadline_s + _GRACE_S)
        elif self._keeper is not None:
            self._keeper.cancel()
        self.cut()
        if self._keeper is not None:
            await asyncio.wait([self._keeper])

    def cut(self) -> None:
        """End the engine now, with whatever it does."""
        self._is_closing = True
        self._link.cut()

    def _require_up(self) -> None:
        if self._is_closing:
            raise EngineFullError(len(self._running), retry_after_s=5)
        if not self._is_up:
            raise EngineDownError(f"{self.name} is being started again", max(1, round(self._delay_s)))
        self._keep()

    def _keep(self) -> None:
        """Listen to the engine, and start it again when it ends; there was no event loop to do so before."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._run())

    async def _ask(self, question: Callable[[int], Message]) -> Done:
        self._require_up()
        return await self._answer(question)

    async def _answer(self, question: Callable[[int], Message]) -> Done:
        number = next(self._numbers)
        answer: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            self._link.send(encode(question(number)))
            return await answer
        except asyncio.CancelledError:
            self._link.send(encode(Cancel(number)))
            raise
        finally:
            del self._answers[number]

    async def _run(self) -> None:
        while True:
            began_s = time.monotonic()
            try:
                while True:
                    self._take(decode_from_worker(await self._link.receive()))
            except LinkLostError as error:
                self._lose(str(error))
            except Exception:  # a message that is none: whoever sends it cannot be relied on
                _log.exception("%s said something that is not understood", self.name)
                self._link.cut()
                self._lose("said something that is not understood")
            if self._is_closing:
                return
            await self._restart(was_healthy=time.monotonic() - began_s > _HEALTHY_S)

    def _take(self, message: FromWorker) -> None:
        match message:
            case Events(events):
                for number, event in events:
                    if number in self._running:  # else nobody waits for it any more
                        self._running[number].add(event)
            case Done(number):
                if number in self._answers and not self._answers[number].done():
                    self._answers[number].set_result(message)
            case _:
                assert not isinstance(message, Ready), "an engine says once that it is ready"
                error, running = as_error(message), self._running.get(message.number)
                if running is not None and running.is_begun:
                    running.end("error", message.text)
                elif running is not None:
                    running.open.clear()
                    running.queue.put_nowait(error)
                elif message.number in self._answers and not self._answers[message.number].done():
                    self._answers[message.number].set_exception(error)

    def _lose(self, reason: str) -> None:
        """The engine has ended: say so to all who wait for it."""
        self._is_up = False
        self._past = replace(add_stats(self._past, self._latest), **dict.fromkeys(_GAUGES, 0))
        self._latest = NO_STATS
        if not self._is_closing:
            _log.warning("%s %s with %d requests: it is started again", self.name, reason, len(self._running))
        for running in self._running.values():
            if self._is_closing:
                running.end("cancelled")
            elif running.is_begun:
                running.end("error", f"{self.name}, which computed this answer, {reason}: send the request again")
            else:
                running.open.clear()
                running.queue.put_nowait(EngineDownError(f"{self.name} {reason}", 1))
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineDownError(f"{self.name} {reason}", 1))

    async def _restart(self, was_healthy: bool) -> None:
        if was_healthy:
            self._delay_s = 0.0
        while True:
            await asyncio.sleep(self._delay_s)
            self._delay_s = min(_MOST_DELAY_S, max(_FIRST_DELAY_S, 2 * self._delay_s))
            try:
                self._link = await self._connect()
                break
            except (LinkLostError, UserError, WorkerBugError) as error:
                _log.warning("%s did not start: %s; the next try is in %.0f s", self.name, error, self._delay_s)
        self.num_starts += 1
        self._restoring = asyncio.create_task(self._restore())  # its answers are read by `_run`

    async def _restore(self) -> None:
        """Load the adapters that were loaded before, then take requests."""
        for name, path in list(self._adapters.items()):
            if path is None:  # the engine loads it by itself
                continue
            try:
                await self._answer(lambda number, name=name, path=path: LoadAdapter(number, name, path))  # type: ignore[misc]
            except UserError as error:
                _log.warning("%s has lost the adapter %s: %s", self.name, name, error)
                del self._adapters[name]
            except EngineDownError:
                return  # it has ended already, and is started again
        self._is_up = True
        _log.warning("%s is up again", self.name)
