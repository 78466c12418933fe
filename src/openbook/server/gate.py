"""What every request passes through: who may come, under which name, how often; and what every answer carries."""

from __future__ import annotations

import ipaddress
import logging
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openbook.server.body import LimitedBody
from openbook.server.errors import ApiError, server_error
from openbook.server.limits import Account
from openbook.server.state import ServerState

# A key opens these; open to all are the page, which asks for one, /health and /docs.
_CLOSED_PREFIXES = ("/v1", "/tokenize", "/detokenize", "/metrics")
_COUNTED_PREFIX = "/v1"  # of requests that count against a key's limit
# Nothing here may be framed, sniffed or run; the page has a policy of its own.
_SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
_log = logging.getLogger("openbook.server")


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        settings, metrics = self._state.settings, self._state.metrics
        body = LimitedBody(receive, settings.max_body_bytes, settings.body_timeout_s)
        request_id = f"req_{uuid4().hex}"
        answer = _Answer(send, request_id)
        metrics.open_requests.inc()
        try:
            self._admit(scope)
            answer.account = self._account(scope)
            if answer.account is not None and scope["path"].startswith(_COUNTED_PREFIX):
                answer.account.admit_request()
            body.check_length(scope)
            await self._app(scope, body, answer.send)
        except ApiError as error:  # of the gate itself; the application answers its own
            await error.response()(scope, receive, answer.send)
        except Exception:
            if answer.status is None:
                _log.exception("the request %s failed", request_id)
                await server_error().response()(scope, receive, answer.send)
            else:
                raise
        finally:
            metrics.open_requests.dec()
            metrics.requests.labels(_route(scope), answer.status or 499).inc()

    def _admit(self, scope: Scope) -> None:
        self._check_host(Headers(scope=scope).get("host", ""))
        if self._state.is_draining and scope["path"] != "/health":
            raise ApiError(503, "the server stops: ask again in a moment", code="shutting_down", retry_after_s=5)

    def _account(self, scope: Scope) -> Account | None:
        """The account of the request's key; None where none is asked for."""
        if not self._state.keys or not scope["path"].startswith(_CLOSED_PREFIXES):
            return None
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        index = self._state.keys.find(key.strip()) if scheme.lower() == "bearer" else None
        if index is None:
            given = "no API key was given" if not key else "the API key is wrong"
            raise ApiError(
                401, f"{given}: send the header `Authorization: Bearer KEY` with a valid one", code="invalid_api_key"
            )
        account = self._state.accounts[index]
        scope.setdefault("state", {})["account"] = account
        return account

    def _check_host(self, given: str) -> None:
        """See `ServerSettings.checks_host`."""
        settings = self._state.settings
        if not settings.checks_host:
            return
        name = given.rsplit(":", 1)[0] if not given.endswith("]") else given
        name = name.strip("[]").lower()
        if name in ("localhost", settings.host.lower(), *settings.allowed_hosts) or _is_address(name):
            return
        raise ApiError(
            403,
            f"the server was called {name[:80]!r}, which is no name of its own: use an IP address or localhost, or "
            "start it with --allowed-host",
            code="host_not_allowed",
        )


class _Answer:
    """Adds what every answer carries, and remembers its status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id = send, request_id
        self.status: int | None = None
        self.account: Account | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._request_id
            for name, value in _SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            if self.account is not None:
                headers.update(self.account.headers())
        await self._send(message)


def _route(scope: Scope) -> str:
    """The route's pattern, of which there are few, unlike paths."""
    return getattr(scope.get("route"), "path", "other")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
