"""The process that computes for a client elsewhere: `python -m openbook.engine.worker FD`.

It speaks the messages of `wire.py`, each behind its length, over the socket FD, and ends when that is closed: a parent
that dies, however it dies, leaves no orphans.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import socket
import struct
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, cast

from openbook.core.errors import UserError
from openbook.engine.client import EngineClient, EngineFullError
from openbook.engine.events import SequenceEvent
from openbook.engine.request import Request
from openbook.engine.start import StartedEngine, start_engine
from openbook.engine.wire import (
    AskStats,
    Cancel,
    Close,
    Done,
    Embed,
    Events,
    Launch,
    LoadAdapter,
    Message,
    Ready,
    Submit,
    ToWorker,
    UnloadAdapter,
    as_failed,
    decode_to_worker,
    encode,
)
from openbook.ops.native_module import has_native, require_native

LENGTH = struct.Struct("<I")  # of the message that follows, in bytes

_log = logging.getLogger("openbook.engine")


class MessageServer:
    """Does what messages ask of an engine. Everything here is called on one event loop.

    Args:
        engine: what answers.
        send: takes each message to the client, as bytes.
    """

    def __init__(self, engine: EngineClient, send: Callable[[bytes], None]) -> None:
        self._engine, self._send = engine, send
        self._requests: dict[int, asyncio.Task[None]] = {}
        self._chores: set[asyncio.Task[None]] = set()
        self._outbox: list[tuple[int, SequenceEvent]] = []
        self.is_closed = asyncio.Event()  # all is done and said

    def receive(self, message: ToWorker) -> None:
        """Begin what a message asks for."""
        match message:
            case Submit(number, request):
                self._requests[number] = asyncio.create_task(self._answer(number, request))
            case Embed(number, prompts, adapter):
                self._requests[number] = asyncio.create_task(self._embed(number, prompts, adapter))
            case Cancel(number):
                if number in self._requests:  # else it has just ended
                    self._requests[number].cancel()
            case AskStats(number):
                self._begin(number, self._stats(number))
            case LoadAdapter(number, name, path):
                self._begin(number, self._adapter(number, self._engine.load_adapter(name, path)))
            case UnloadAdapter(number, name):
                self._begin(number, self._adapter(number, self._engine.unload_adapter(name)))
            case Close(deadline_s):
                self._begin(0, self._close(deadline_s))
            case Launch():
                raise ValueError("a process is launched once")

    def cancel_all(self) -> None:
        """Nobody waits for the answers that are running any more."""
        for task in self._requests.values():
            task.cancel()

    async def _answer(self, number: int, request: Request) -> None:
        try:
            async with aclosing(cast(AsyncGenerator[SequenceEvent], self._engine.submit(request))) as events:
                async for event in events:
                    if not self._outbox:  # the others of this step are added before the loop comes to the call
                        asyncio.get_running_loop().call_soon(self._flush)
                    self._outbox.append((number, event))
        except Exception as error:
            self._flush()
            self._fail(number, error)
        finally:
            del self._requests[number]

    def _flush(self) -> None:
        events, self._outbox = self._outbox, []
        if not events:
            return
        try:
            self._send(encode(Events(events)))
        except UnicodeEncodeError:  # one of them holds half of a surrogate pair: it alone must suffer
            for number, event in events:
                try:
                    self._send(encode(Events([(number, event)])))
                except UnicodeEncodeError as error:
                    if number in self._requests:
                        self._requests[number].cancel()
                    self._fail(number, error)

    async def _embed(self, number: int, prompts: list[list[int]], adapter: str | None) -> None:
        try:
            self._say(Done(number, embeddings=await self._engine.embed(prompts, adapter)))
        except Exception as error:
            self._fail(number, error)
        finally:
            del self._requests[number]

    def _begin(self, number: int, chore: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            try:
                await chore
            except Exception as error:
                self._fail(number, error)

        task = asyncio.create_task(run())
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def _stats(self, number: int) -> None:
        self._say(Done(number, await self._engine.stats()))

    async def _adapter(self, number: int, work: Coroutine[Any, Any, None]) -> None:
        await work
        self._say(Done(number))

    async def _close(self, deadline_s: float) -> None:
        try:
            await self._engine.close(deadline_s)
        finally:
            running = list(self._requests.values())  # they have their last event, or will never get one
            _, late = await asyncio.wait(running, timeout=1.0) if running else ((), ())
            for task in late:
                task.cancel()
            self._flush()
            self.is_closed.set()

    def _fail(self, number: int, error: Exception) -> None:
        if not isinstance(error, UserError | EngineFullError):
            _log.error("the engine failed on a request", exc_info=error)
        self._say(as_failed(number, error))

    def _say(self, message: Message) -> None:
        self._send(encode(message))


def launch(message: Launch) -> StartedEngine:
    """Load what a message says, in the threads that it grants; torch has been told by the environment.

    Raises:
        UserError: see `start_engine`.
    """
    if has_native():
        require_native().set_num_threads(message.num_threads)
    return start_engine(message.model, message.options, message.settings)


async def ready(started: StartedEngine) -> Ready:
    """What the client is told of a loaded model."""
    engine = started.engine
    return Ready(started.profile, engine.max_model_len, (await engine.stats()).num_blocks, engine.adapters)


async def _serve(parent: socket.socket) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=parent)

    def send(data: bytes) -> None:
        writer.write(LENGTH.pack(len(data)))
        writer.write(data)

    async def receive() -> ToWorker:
        try:
            (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
            return decode_to_worker(await reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            os._exit(0)  # the parent is gone: nothing that runs here is of use to anybody

    async def listen() -> None:  # from the start, to notice the parent's end while the model is loaded
        while True:
            message = await receive()
            (await loaded).receive(message)

    first = await receive()
    assert isinstance(first, Launch)
    loaded: asyncio.Future[MessageServer] = asyncio.get_running_loop().create_future()
    listening = asyncio.create_task(listen())
    try:
        started = await asyncio.to_thread(launch, first)
        send(encode(await ready(started)))
        server = MessageServer(started.engine, send)
        loaded.set_result(server)
        await server.is_closed.wait()
    except Exception as error:
        if not isinstance(error, UserError):
            _log.error("the model could not be loaded", exc_info=error)
        send(encode(as_failed(0, error)))
    listening.cancel()
    await writer.drain()
    writer.close()
    await writer.wait_closed()


def main() -> None:
    """Serve the socket whose number is the first argument."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes its engines
    asyncio.run(_serve(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
