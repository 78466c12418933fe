"""Errors in the OpenAI API's shape, whatever went wrong: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from openbook.core.errors import UserError
from openbook.engine.client import EngineDownError, EngineFullError

CLIENT_GONE = 499  # nginx's number for a client that left; nobody reads the answer
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_MAX_SHOWN = 80  # characters of a wrong value in a message

# Parameters of the OpenAI API that are refused, and what to do instead.
REFUSED: dict[str, str] = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "best_of": "ask for n answers and choose among them",
    "suffix": "no model here fills in the middle; leave it out",
    "audio": "no model here speaks; leave it out",
    "prediction": "leave it out: guessing ahead is the operator's choice",
    "web_search_options": "nothing is fetched for a request; leave it out",
    "chat_template_kwargs": "use reasoning_effort",
    "moderation": "there is no moderation here; leave it out",
}


class ApiError(HTTPException):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one line that says what was given, what was expected and the fix.
        param: the parameter that is wrong, as a path into the body ("messages[0].content").
        code: a fixed word for programs.
        retry_after_s: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        headers = {} if retry_after_s is None else {"retry-after": str(retry_after_s)}
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """The value that is sent as JSON."""
        kind = _TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The answer."""
        return Response(
            msgspec.json.encode(self.body()), self.status_code, headers=self.headers, media_type="application/json"
        )


def user_error(error: UserError, param: str | None = None, params: Mapping[str, str] | None = None) -> ApiError:
    """A UserError as status 400.

    Args:
        param: the parameter that is wrong, if that is certain.
        params: words that a message may begin with, and the parameter that is wrong then.
    """
    message = str(error)
    meant = next((name for words, name in (params or {}).items() if message.startswith(f"{words} ")), None)
    return ApiError(400, message, param=param or meant, code="invalid_value")


def as_api_error(error: BaseException, params: Mapping[str, str] | None = None) -> ApiError | None:
    """What an exception of the engine means to a client; None for a bug. `params`: see `user_error`."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return user_error(error, params=params)
    if isinstance(error, EngineDownError):
        return ApiError(503, str(error), code="engine_down", retry_after_s=error.retry_after_s)
    if isinstance(error, EngineFullError):
        return ApiError(429, str(error), code="queue_full", retry_after_s=error.retry_after_s)
    return None


def server_error() -> ApiError:
    """What a client is told of a bug: nothing but that there was one."""
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def add_error_handlers(app: FastAPI) -> None:
    """Make every error of the application an `ApiError`'s answer; for bugs `openbook.server.gate` does."""

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _from_http(error, request).response()

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return explain_validation(error.errors(), error.body).response()

    async def on_engine(request: Request, error: Exception) -> Response:
        return (as_api_error(error) or server_error()).response()

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(UserError, on_engine)
    app.add_exception_handler(EngineFullError, on_engine)


def _from_http(error: HTTPException, request: Request) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if error.status_code == 404:
        return ApiError(404, f"there is nothing at {request.url.path}: see /docs", code="not_found")
    if error.status_code == 405:
        wrong = ApiError(405, f"{request.url.path} does not take {request.method}: see /docs", code="wrong_method")
        wrong.headers = dict(error.headers or {})
        return wrong
    return ApiError(error.status_code, str(error.detail))


def explain_validation(errors: Sequence[Any], body: Any) -> ApiError:
    """The one line for what a request model refused: an unknown parameter first, else the error deepest inside.

    Args:
        errors: pydantic's, whose `loc` begins with "body", "query" or "path".
        body: what was given.
    """
    found = [_Problem(error, body) for error in errors]
    unknown = [problem for problem in found if problem.kind == "unknown_parameter"]
    problem = max(unknown or found, key=lambda problem: problem.reach)
    return ApiError(400, problem.message(), param=problem.param or None, code=problem.code)


class _Problem:
    """One of pydantic's errors, with the path that a client would write."""

    def __init__(self, error: Mapping[str, Any], body: Any) -> None:
        self.kind: str = error["type"]
        self._text: str = error["msg"]
        self._given: Any = error.get("input")
        self._context: Mapping[str, Any] = error.get("ctx") or {}
        where, *inside = error["loc"]
        self._is_body = where == "body"
        self.path = list(_real_path(inside, body)) if self._is_body else [str(part) for part in inside]
        if self.kind == "missing" and inside and (not self.path or self.path[-1] != inside[-1]):
            self.path.append(inside[-1])
        if self.kind == "unknown_parameter":
            self.path.append(self._context["name"])
        if self.kind.startswith("union_tag_"):  # one kind of object of several, told apart by one of its fields
            name = self._context["discriminator"].strip("'")
            self.path.append(name)
            self._given = self._given.get(name) if isinstance(self._given, dict) else self._given
            self._text = f"expected one of {self._context.get('expected_tags')}"
            self.kind = "missing" if self.kind == "union_tag_not_found" else self.kind

    @property
    def reach(self) -> tuple[int, bool, int]:
        """How far pydantic got: of a union's branches, the one that got furthest is the one that was meant."""
        last = self.path[-1] if self.path else 0
        return len(self.path), not self.kind.endswith("_type"), last if isinstance(last, int) else 0

    @property
    def param(self) -> str:
        text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)
        return text.removeprefix(".")

    @property
    def code(self) -> str | None:
        codes = {"unknown_parameter": "unknown_parameter", "missing": "missing_parameter"}
        return codes.get(self.kind, "invalid_value")

    def message(self) -> str:
        if self._is_body and not self.path and self.kind != "value_error":
            return "the body is no JSON object with the parameters of this endpoint: send one; see /docs"
        if self.kind == "unknown_parameter":
            return _unknown_parameter(self.param, str(self.path[-1]), self._context["nearest"])
        if self.kind == "missing":
            return f"the parameter {self.param} is missing: give it"
        if self.kind == "value_error":  # our own checks, which say everything
            return str(self._context.get("error", self._text))
        shown = repr(self._given)
        shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
        expected = self._text[:1].lower() + self._text[1:]
        return f"{self.param} is {shown}: {expected.replace('input should', 'it should')}; correct that value"


def _real_path(inside: Iterable[Any], body: Any) -> Iterable[str | int]:
    """The parts of a `loc` that lead into the body; the names of a union's branches stand between them."""
    current = body
    for part in inside:
        is_index = isinstance(current, list) and isinstance(part, int) and part < len(current)
        if is_index or (isinstance(current, dict) and part in current):
            current = current[part]
            yield part


def _unknown_parameter(path: str, name: str, nearest: str) -> str:
    if name in REFUSED:
        return f"the parameter {path} is not supported: {REFUSED[name]}"
    fix = f"did you mean {nearest}?" if nearest else "leave it out;"
    return f"unknown parameter {path}: {fix} /docs lists all"
