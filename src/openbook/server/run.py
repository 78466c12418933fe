"""A server process: listens, says where, and stops in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Mapping

import uvicorn
from fastapi import FastAPI

from openbook.core.errors import UserError
from openbook.server.protocol import MAX_HEADER_BYTES, protocol_type
from openbook.server.state import ServerState

_KEEP_ALIVE_S = 60
_BACKLOG = 2048
_LAST_WORDS_S = 5  # behind the deadline of running answers, to send their ends
_log = logging.getLogger("openbook.server")


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that an address in use is found before a model is loaded.

    Args:
        port: 0 takes a free one.

    Raises:
        UserError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot listen on {host} port {port}: {reason}; choose another with --host and --port"
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where clients reach a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, stopped by SIGTERM or Ctrl-C: running answers get their time, and the process ends with status 0.

    Args:
        app: of `create_app`.
        on_ready: called when requests are taken.
        adapters: name and path of those of the first model, loaded before that.
        log_level: of uvicorn's and our loggers.
    """

    def __init__(
        self,
        app: FastAPI,
        on_ready: Callable[[], None],
        adapters: Mapping[str, str] | None = None,
        log_level: str = "warning",
    ) -> None:
        state = app.state.openbook
        assert isinstance(state, ServerState)
        self._state, self._on_ready, self._adapters = state, on_ready, dict(adapters or {})
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=protocol_type(state.settings),
                ws="none",
                lifespan="on",
                log_level=log_level,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=round(state.settings.drain_s) + _LAST_WORDS_S,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                backlog=_BACKLOG,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.

        Raises:
            UserError: an adapter cannot be loaded.
        """
        try:
            for name, path in self._adapters.items():
                await self._state.models.first.engine.load_adapter(name, path)
        except BaseException:
            await self._state.drain(0)
            raise
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn, which stops listening and waits for open connections; meanwhile the engines end."""
        draining = asyncio.create_task(self._state.drain(self._state.settings.drain_s))
        await super().shutdown(sockets)
        if self.force_exit:
            draining.cancel()
            await self._state.drain(0)
            await self.lifespan.shutdown()  # which uvicorn leaves out then
        with contextlib.suppress(asyncio.CancelledError):
            await draining

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn, which would send itself the signal again at the end, and so end with another status."""
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(
    app: FastAPI,
    listener: socket.socket,
    on_ready: Callable[[], None],
    *,
    adapters: Mapping[str, str] | None = None,
    log_level: str = "warning",
) -> None:
    """Serve on a socket until SIGTERM or Ctrl-C; a second Ctrl-C cuts running answers off. See `Server`.

    Raises:
        UserError: an adapter cannot be loaded.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("openbook").setLevel(log_level.upper())
    _raise_file_limit()
    Server(app, on_ready, adapters, log_level).run(sockets=[listener])


def _raise_file_limit() -> None:
    """Each connection is an open file, and many systems allow 1,024 unless asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _log.info("open files: %d, at most %d", soft, hard)
