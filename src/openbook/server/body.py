"""Reading a request's body: within its limits, and strictly as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message, Receive, Scope

from openbook.server.errors import ApiError


class JsonRequest(Request):
    """A request whose body is JSON as the standard has it: no NaN, no broken UTF-8, nothing nested without end."""

    async def json(self) -> Any:
        """The body's value.

        Raises:
            ApiError: 400, it is no JSON.
        """
        try:
            return msgspec.json.decode(await self.body())
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            reason = str(error).partition(" - at ")[0]
        except RecursionError:
            reason = "it is nested too deeply"
        raise ApiError(400, f"the body is not valid JSON ({reason}): correct it", code="invalid_json")


class JsonRoute(APIRoute):
    """A route that takes a `JsonRequest`, and nothing but JSON.

    A web page elsewhere may send forms and plain text here without asking; only for JSON a browser asks first.
    """

    def get_route_handler(self) -> Callable[[Request], Any]:
        """See FastAPI."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json":
                raise ApiError(
                    415,
                    f"the content type is {kind[:80]!r}: expected application/json; add that header",
                    code="unsupported_media_type",
                )
            response: Response = await handle(JsonRequest(request.scope, request.receive))
            return response

        return handle_json


class LimitedBody:
    """Passes a body on until it has too many bytes, or takes too long.

    Args:
        receive: of the connection.
        max_bytes: of the whole body.
        timeout_s: for the whole body.
    """

    def __init__(self, receive: Receive, max_bytes: int, timeout_s: float) -> None:
        self._receive, self._max_bytes, self._timeout_s = receive, max_bytes, timeout_s
        self._num_bytes = 0
        self._end_s: float | None = None
        self._is_whole = False

    def check_length(self, scope: Scope) -> None:
        """Refuse a body by its announced length, before any of it is read.

        Raises:
            ApiError: 413, it is too large.
        """
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            raise self._too_large()

    async def __call__(self) -> Message:
        """As ASGI's receive.

        Raises:
            ApiError: 413, the body is too large; 408, it does not come.
        """
        if self._is_whole:  # what follows is only that the client leaves
            return await self._receive()
        loop = asyncio.get_running_loop()
        self._end_s = self._end_s or loop.time() + self._timeout_s
        try:
            async with asyncio.timeout_at(self._end_s):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self._timeout_s:g} s: send it faster") from None
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
            if self._num_bytes > self._max_bytes:
                raise self._too_large()
        return message

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body has more than {self._max_bytes:,} bytes: expected at most that; send less", code="too_large"
        )
