"""An engine in a process of its own on this machine, started again when it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

from openbook.core.errors import one_line
from openbook.engine.remote_engine import LinkLostError, RemoteEngine
from openbook.engine.wire import Failed, Launch, Ready, as_error, decode_from_worker, encode
from openbook.engine.worker import LENGTH

_END_S = 5.0  # for a process whose socket is closed to end


class ProcessLink:
    """A process and the socket to it; see `Link`. The model loads while the caller does something else.

    Args:
        launch: what the process is to load.

    Raises:
        UserError: the system starts no process.
    """

    def __init__(self, launch: Launch) -> None:
        self._socket, theirs = socket.socketpair()
        self._ready: Ready | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._early: list[bytes] = []  # sent before there was a writer
        descriptor = theirs.fileno()
        # -P: nothing of the current folder is imported. A session of its own: Ctrl-C reaches the parent alone.
        command = [sys.executable, "-P", "-m", "openbook.engine.worker", str(descriptor)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(launch.num_threads)}  # torch and BLAS go by it
        with theirs:
            try:
                self._process = subprocess.Popen(
                    command,
                    pass_fds=[descriptor],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=2,
                    start_new_session=True,
                )
            except OSError as error:
                self._socket.close()
                raise one_line(error, "start an engine process") from error
        with suppress(ConnectionError):  # it may have ended: `wait_ready` says so
            self._socket.sendall(_framed(encode(launch)))

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def ready(self) -> Ready:
        """See `Link.ready`."""
        assert self._ready is not None, "wait_ready comes first"
        return self._ready

    def wait_ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            UserError: it cannot be.
            LinkLostError: the process has ended.
        """
        (length,) = LENGTH.unpack(self._read(LENGTH.size))
        message = decode_from_worker(self._read(length))
        if isinstance(message, Failed):
            raise as_error(message)
        assert isinstance(message, Ready)
        self._ready = message

    def send(self, data: bytes) -> None:
        """See `Link.send`."""
        if self._writer is None:
            self._early.append(data)
        elif not self._writer.is_closing():
            self._writer.write(_framed(data))

    async def receive(self) -> bytes:
        """See `Link.receive`."""
        try:
            if self._reader is None:
                self._reader, self._writer = await asyncio.open_unix_connection(sock=self._socket)
                self._writer.writelines(map(_framed, self._early))
            (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            return await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, OSError) as error:
            if self._writer is not None:
                self._writer.close()
            raise LinkLostError(await asyncio.to_thread(self._end)) from error

    def cut(self) -> None:
        """See `Link.cut`."""
        self._process.kill()
        self._process.wait()
        if self._writer is None:
            self._socket.close()

    def _read(self, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            try:
                part = self._socket.recv(num_bytes - len(data))
            except OSError:  # closed by `cut`, in another thread
                part = b""
            if not part:
                raise LinkLostError(self._end())
            data += part
        return data

    def _end(self) -> str:
        """What became of the process, whose end of the socket is closed."""
        try:
            status = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        if status >= 0:
            return f"ended with status {status}"
        return f"was killed by {signal.Signals(-status).name}"


class ProcessEngine(RemoteEngine):
    """See `EngineClient`.

    Args:
        name: what log and errors call it.
        launch: what it loads, also when it is started again.
        link: to a process that has loaded it.
    """

    def __init__(self, name: str, launch: Launch, link: ProcessLink) -> None:
        super().__init__(name, link)
        self._launch, self._process = launch, link

    @property
    def pid(self) -> int:
        """Of the process that computes now, or did last."""
        return self._process.pid

    async def _connect(self) -> ProcessLink:
        link = self._process = ProcessLink(self._launch)
        try:
            await asyncio.to_thread(link.wait_ready)
        except BaseException:
            link.cut()
            raise
        return link


def _framed(data: bytes) -> bytes:
    return LENGTH.pack(len(data)) + data
