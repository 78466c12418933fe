"""Bodies that are no requests: each gets a clean error, and the server goes on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from server_setup import LiveServer, StubEngine

PATH = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def error_of(response: httpx2.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "Traceback" not in response.text
    return error  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not valid JSON (Input data was truncated): correct it"),
        (b'{"model": NaN}', "the body is not valid JSON (JSON is malformed: invalid character (byte 10)): correct it"),
        (b'{"temperature": 1e999}', "the body is not valid JSON (Number out of range): correct it"),
        (b'{"model": "\xff\xfe"}', "the body is not valid JSON ('utf-8' codec can't decode"),
        (b'{"model": "\\ud800"}', "the body is not valid JSON ("),
        (b"[" * 1_000_000, "the body is not valid JSON (it is nested too deeply): correct it"),
        (b'{"a":' * 200_000, "the body is not valid JSON (it is nested too deeply): correct it"),
        (b"null", "the body is no JSON object"),
        (b'"text"', "the body is no JSON object"),
        (b"", "the body is no JSON object"),
    ],
)
def test_what_is_no_json(http: httpx2.Client, body: bytes, message: str) -> None:
    response = http.post(PATH, content=body, headers=JSON)
    assert response.status_code == 400
    assert error_of(response)["message"].startswith(message)
    assert http.get("/health").status_code == 200


def test_ten_megabytes_of_prompt(http: httpx2.Client) -> None:
    began_s = time.monotonic()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x y " * 2_500_000}]}
    response = http.post(PATH, json=body)
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert error["message"].startswith("the prompt has 10,000,004 characters and the model's context is 512 tokens")
    assert time.monotonic() - began_s < 5


def test_many_messages(http: httpx2.Client) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": ""}] * 10_001}
    error = error_of(http.post(PATH, json=body))
    assert error["param"] == "messages" and "at most 10000 items" in error["message"]


def test_a_deep_schema_is_refused(http: httpx2.Client) -> None:
    schema: Any = {"type": "object"}
    for _ in range(300):
        schema = {"properties": {"a": schema}}
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
    }
    response = http.post(PATH, json=body)
    assert response.status_code == 400
    error_of(response)


def test_only_json_is_read(http: httpx2.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        response = http.post(PATH, content=b"{}", headers={"content-type": kind})
        assert response.status_code == 415
        assert error_of(response)["message"] == (
            f"the content type is {kind.partition(';')[0]!r}: expected application/json; add that header"
        )
    assert (
        http.post(PATH, content=b"{}", headers={"content-type": "application/json; charset=utf-8"}).status_code == 400
    )


def test_other_paths_and_methods(http: httpx2.Client) -> None:
    response = http.get("/nothing/here")
    assert response.status_code == 404
    assert error_of(response)["message"] == "there is nothing at /nothing/here: see /docs"
    response = http.get(PATH)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert error_of(response)["message"] == f"{PATH} does not take GET: see /docs"


def head(length: int) -> bytes:
    """The headers of a request with a body of so many bytes."""
    kind = f"Content-Type: application/json\r\nContent-Length: {length}"
    return f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\n{kind}\r\n\r\n".encode()


def read_error(connection: socket.socket) -> str:
    """An answer up to the end of its JSON."""
    answer = b""
    while not answer.endswith(b"}}"):
        part = connection.recv(4096)
        assert part, answer
        answer += part
    return answer.decode()


@pytest.fixture
def small(start: Callable[..., LiveServer], stub: StubEngine) -> Iterator[LiveServer]:
    yield start(stub, max_body_bytes=2000, body_timeout_s=0.5)


def test_a_large_body_is_refused_by_its_length(small: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", small.port), timeout=5) as connection:
        connection.sendall(head(9_000_000_000))
        answer = read_error(connection)
    assert answer.startswith("HTTP/1.1 413 ")
    assert "the body has more than 2,000 bytes: expected at most that; send less" in answer


def test_a_large_body_in_pieces_is_refused_while_it_comes(small: LiveServer) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    with small.client() as client:
        response = client.post(PATH, content=pieces(), headers=JSON)
    assert response.status_code == 413
    assert error_of(response)["code"] == "too_large"


def test_a_body_that_does_not_come(small: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", small.port), timeout=5) as connection:
        connection.sendall(head(100) + b"{")
        answer = read_error(connection)
    assert answer.startswith("HTTP/1.1 408 ")
    assert "the body did not come within 0.5 s" in answer


def test_a_bug_shows_no_traceback(
    start: Callable[..., LiveServer], stub: StubEngine, caplog: pytest.LogCaptureFixture
) -> None:
    stub.failure = ZeroDivisionError("secret detail")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    with start(stub).client() as client:
        response = client.post(PATH, json=body)
    assert response.status_code == 500
    assert error_of(response) == {
        "message": "the server failed on this request; its log says why",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert "secret detail" in caplog.text
    assert json.loads(response.text)
