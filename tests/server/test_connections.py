"""Clients that leave, stall or never finish; and the end of a server."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest
from server_setup import LiveServer, StubEngine

HELLO: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
PATH = "/v1/chat/completions"


def wait_for(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.005)


def request_bytes(body: dict[str, Any], path: str = PATH) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return f"{head}\r\n\r\n".encode() + data


@contextlib.contextmanager
def connection(server: LiveServer) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("has_begun", [False, True])
def test_a_client_that_leaves_is_forgotten_at_once(
    server: LiveServer, stub: StubEngine, stream: bool, has_begun: bool
) -> None:
    stub.pause_s, stub.is_holding = 0.005, not has_begun
    stub.reply = lambda request: "word " * 80
    with connection(server) as made:
        made.sendall(request_bytes({**HELLO, "stream": stream, "n": 2}))
        if has_begun and stream:
            assert b"200 OK" in made.recv(100)
        wait_for(lambda: stub.requests)
    left_s = time.monotonic()
    wait_for(lambda: stub.cancelled == [stub.requests[0].id])
    assert time.monotonic() - left_s < 0.5
    with server.client() as client:
        assert 'openbook_cancelled_requests_total{model="tiny"} 1.0' in client.get("/metrics").text


def test_all_prompts_of_a_client_that_leaves_are_forgotten(server: LiveServer, stub: StubEngine) -> None:
    stub.is_holding = True
    with connection(server) as made:
        made.sendall(request_bytes({"model": "tiny", "prompt": ["a", "b", "c"]}, "/v1/completions"))
        wait_for(lambda: len(stub.requests) == 3)
    wait_for(lambda: sorted(stub.cancelled) == sorted(request.id for request in stub.requests))


def test_the_official_client_stops_a_stream(sdk: openai.OpenAI, stub: StubEngine) -> None:
    stub.pause_s, stub.reply = 0.01, lambda request: "word " * 80
    with sdk.chat.completions.create(**HELLO, stream=True) as stream:
        next(iter(stream))
    wait_for(lambda: stub.cancelled)


def test_silence_is_broken_by_comments(server: LiveServer, stub: StubEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openbook.server.streaming._SILENCE_S", 0.05)
    stub.pause_s, stub.reply = 0.12, lambda request: "ab"
    with server.openai() as sdk:
        chunks = list(sdk.chat.completions.create(**HELLO, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "ab"
    with server.client() as client:
        assert client.post(PATH, json={**HELLO, "stream": True}).text.count(": still working\n\n") >= 2


def test_a_failure_before_the_first_token_has_a_status(server: LiveServer, stub: StubEngine) -> None:
    from openbook.core.errors import UserError
    from openbook.engine.client import EngineDownError, EngineFullError

    for failure, status, code in (
        (EngineFullError(7, retry_after_s=3), 429, "queue_full"),
        (EngineDownError("engine 1 has ended", retry_after_s=3), 503, "engine_down"),
        (UserError("logit_bias has token ids from 1 to 2: wrong"), 400, "invalid_value"),
    ):
        stub.failure = failure
        for stream in (False, True):
            with server.client() as client:
                response = client.post(PATH, json={**HELLO, "stream": stream})
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (status, code)
            assert response.headers.get("retry-after") == ("3" if status != 400 else None)
            assert error["param"] == ("logit_bias" if status == 400 else None)
    with server.client() as client:
        text = client.get("/metrics").text
    assert 'openbook_cancelled_requests_total{model="tiny"} 0.0' in text
    assert 'openbook_prompt_tokens_total{model="tiny"} 0.0' in text


def test_a_sequence_that_fails_harms_no_other(server: LiveServer, stub: StubEngine) -> None:
    from openbook.engine.events import SequenceEvent

    stub.reply = lambda request: "x"
    fine = stub._say

    async def fail(request: Any, index: int) -> Any:
        yield SequenceEvent(request_id=request.id, index=index, finish_reason="error", error="ValueError: broken")

    with server.client() as client:
        stub._say = fail  # type: ignore[method-assign]
        response = client.post(PATH, json=HELLO)
        assert response.status_code == 500
        assert response.json()["error"] == {
            "message": "ValueError: broken",
            "type": "server_error",
            "param": None,
            "code": "generation_failed",
        }
        stream = client.post(PATH, json={**HELLO, "stream": True})
        assert stream.status_code == 200
        *_, error, done, _ = stream.text.split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["message"] == "ValueError: broken"
        assert done == "data: [DONE]"
        stub._say = fine  # type: ignore[method-assign]
        assert client.post(PATH, json=HELLO).status_code == 200


def test_an_engine_that_forgets_a_sequence_is_a_bug(
    server: LiveServer, stub: StubEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async def say_nothing(request: Any, index: int) -> Any:
        for _ in ():
            yield

    stub._say = say_nothing  # type: ignore[method-assign]
    with server.client() as client:
        assert client.post(PATH, json=HELLO).status_code == 500
    assert "the engine left 1 sequences without an end" in caplog.text


def test_a_thousand_half_open_connections_hinder_nobody(start: Callable[..., LiveServer], stub: StubEngine) -> None:
    server = start(stub, header_timeout_s=3)
    with contextlib.ExitStack() as stack:
        half_open = [stack.enter_context(connection(server)) for _ in range(1000)]
        for made in half_open[::2]:
            made.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: local")
        with server.client() as client:
            assert client.post(PATH, json=HELLO).status_code == 200
            assert len(server.server.server_state.connections) > 900  # they were open meanwhile
        for made in (half_open[0], half_open[1], half_open[-1]):
            made.settimeout(10)
            assert made.recv(10) == b""  # closed by the server
        wait_for(lambda: not server.server.server_state.connections)


def test_headers_that_trickle_are_cut_off(start: Callable[..., LiveServer], stub: StubEngine) -> None:
    server = start(stub, header_timeout_s=0.3)
    with connection(server) as made:
        began_s = time.monotonic()
        with pytest.raises(OSError):  # noqa: PT011, RUF100
            for _ in range(100):
                made.sendall(b"x")
                time.sleep(0.02)
        assert time.monotonic() - began_s < 1.5


def test_a_connection_is_used_again(server: LiveServer) -> None:
    with connection(server) as made:
        for _ in range(3):
            made.sendall(request_bytes(HELLO))
            answer = b""
            while b'"usage"' not in answer:
                answer += made.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200")


def test_a_reader_that_stalls_is_given_up(start: Callable[..., LiveServer], stub: StubEngine) -> None:
    server = start(stub, stall_timeout_s=0.3)
    stub.reply = lambda request: "word " * 80
    with connection(server) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.sendall(request_bytes({**HELLO, "stream": True, "n": 128, "logprobs": True, "top_logprobs": 20}))
        wait_for(lambda: stub.requests and stub.cancelled == [stub.requests[0].id], 20)


def test_what_is_no_http(server: LiveServer) -> None:
    with connection(server) as made:
        made.sendall(b"\x16\x03\x01\x02\x00 hello\r\n\r\n")
        answer = b""
        while part := made.recv(4096):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and json.loads(body)["error"]["code"] == "invalid_http"


def test_headers_without_end_are_refused(server: LiveServer) -> None:
    with connection(server) as made, contextlib.suppress(OSError):
        made.sendall(b"GET / HTTP/1.1\r\n" + b"X-Long: " + b"x" * 200_000)
        assert made.recv(100).startswith(b"HTTP/1.1 400 ")


def test_running_answers_end_cleanly_when_the_server_stops(start: Callable[..., LiveServer], stub: StubEngine) -> None:
    server = start(stub, drain_s=0.3)
    stub.pause_s, stub.reply = 0.01, lambda request: "x" * 400
    with connection(server) as streaming, connection(server) as waiting:
        streaming.sendall(request_bytes({**HELLO, "stream": True}))
        waiting.sendall(request_bytes(HELLO))
        wait_for(lambda: len(stub.requests) == 2)
        server.server.should_exit = True
        answers = []
        for made in (streaming, waiting):
            answer = b""
            while part := made.recv(1 << 16):
                answer += part
            answers.append(answer.decode())
    message = '{"error":{"message":"the server stops: ask again in a moment","type":"server_error","param":null,'
    assert message + '"code":"shutting_down"}}' in answers[0] and "data: [DONE]\n\n" in answers[0]
    assert answers[1].startswith("HTTP/1.1 503 ") and message in answers[1]
    server.stop()


def test_running_answers_finish_if_they_can(start: Callable[..., LiveServer], stub: StubEngine) -> None:
    server = start(stub, drain_s=2)
    stub.pause_s = 0.02
    with connection(server) as made:
        made.sendall(request_bytes(HELLO))
        wait_for(lambda: stub.requests)
        server.server.should_exit = True
        answer = b""
        while part := made.recv(1 << 16):
            answer += part
    assert answer.startswith(b"HTTP/1.1 200 ") and b'"content":"yes"' in answer


def test_no_request_is_taken_while_the_server_stops(server: LiveServer, http: httpx2.Client) -> None:
    server.app.state.openbook.is_draining = True
    response = http.post(PATH, json=HELLO)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert response.json()["error"]["code"] == "shutting_down"
    assert http.get("/health").status_code == 503
