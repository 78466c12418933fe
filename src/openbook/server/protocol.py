"""HTTP connections that nobody can hold open for nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from openbook.server.errors import ApiError
from openbook.server.settings import ServerSettings

MAX_HEADER_BYTES = 32 << 10
_BODY_GRACE_S = 10.0  # after the time for a body, in which the application says that it is over


def protocol_type(settings: ServerSettings) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with time limits for what a client sends, and for what it leaves unread."""

    class BoundProtocol(TimedProtocol):
        server_settings = settings

    return BoundProtocol


class TimedProtocol(H11Protocol):
    """A connection that is closed when headers or body do not come in time, or what is sent is not read."""

    server_settings: ServerSettings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._incoming: asyncio.TimerHandle | None = None
        self._incoming_state: object = None  # what the timer waits for the end of
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        self._watch_incoming()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._cancel_incoming()
        self._cancel_stalled()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        super().data_received(data)
        self._watch_incoming()

    def on_response_complete(self) -> None:
        """See uvicorn: from here on its own timer runs until the next request begins."""
        self._cancel_incoming()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """See asyncio: the client reads more slowly than we write."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.server_settings.stall_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """See asyncio."""
        self._cancel_stalled()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as everything else that is wrong, and close."""
        error = ApiError(400, "this is no valid HTTP request: correct the client", code="invalid_http")
        body = msgspec.json.encode(error.body())
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        try:
            parts = (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            for part in parts:
                self.transport.write(self.conn.send(part) or b"")
        except h11.LocalProtocolError:  # amid another answer
            self.transport.abort()
        self.transport.close()

    def _watch_incoming(self) -> None:
        """Bound the time for the headers, or the body, that are on their way."""
        state = self.conn.their_state
        if state is self._incoming_state:
            return
        self._cancel_incoming()
        settings = self.server_settings
        if state is h11.IDLE:
            limit_s = settings.header_timeout_s
        elif state is h11.SEND_BODY:
            limit_s = settings.body_timeout_s + _BODY_GRACE_S
        else:
            return
        self._incoming_state = state
        self._incoming = self.loop.call_later(limit_s, self.transport.close)

    def _cancel_incoming(self) -> None:
        self._incoming_state = None
        if self._incoming is not None:
            self._incoming.cancel()
            self._incoming = None

    def _cancel_stalled(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
