"""A server that says what a test wants: the built page under its strict policy, and the API's answers from a script."""

from __future__ import annotations

import json
import mimetypes
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import openbook

WEB = Path(openbook.__file__).parent / "server" / "web"

# What the page needs at most; the real server's policy may be no stricter.
POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
    "connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
NANO_TASKS = ["spell_backward", "chain_sum", "leg_counting", "gcd", "lcm", "prime_factorization", "color_cube_rotation"]

Event = dict[str, Any]


def model(name: str = "nano", **abilities: Any) -> dict[str, Any]:
    """One entry of /v1/models."""
    known = {
        "max_model_len": 512,
        "is_base": False,
        "has_thinking": True,
        "has_tools": False,
        "sees_images": False,
        "efforts": ["low", "medium", "high"],
        "adapters": [],
        "profile": "exact",
        "tasks": NANO_TASKS,
    }
    assert abilities.keys() <= known.keys()
    return {"id": name, "object": "model", "parent": None, "openbook": known | abilities}


def delta(*, logprobs: dict[str, Any] | None = None, **parts: Any) -> Event:
    """One event of a stream with something new."""
    choice: dict[str, Any] = {"index": 0, "delta": parts, "finish_reason": None}
    return {"object": "chat.completion.chunk", "choices": [choice | ({"logprobs": logprobs} if logprobs else {})]}


def thinks(*texts: str) -> list[Event]:
    """Events that add to the thinking."""
    return [delta(reasoning_content=text, reasoning=text) for text in texts]


def says(*texts: str) -> list[Event]:
    """Events that add to the answer."""
    return [delta(content=text) for text in texts]


def ends(reason: str = "stop", *, usage: dict[str, Any] | None = None, receipt: Any = None) -> list[Event]:
    """The events that end an answer."""
    choice = {"index": 0, "delta": {}, "finish_reason": reason} | ({"receipt": receipt} if receipt else {})
    return [{"choices": [choice]}, {"choices": [], "usage": usage}] if usage else [{"choices": [choice]}]


def usage(prompt: int, completion: int, reasoning: int = 0) -> dict[str, Any]:
    """Token counts as the API gives them."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


@dataclass(frozen=True, kw_only=True)
class Script:
    """One answer.

    Args:
        events: sent in order; a threading.Event among them holds the rest back until it is set.
        status: other than 200: `events[0]` is the whole body.
        headers: beside the usual ones.
        is_cut: the connection ends without `[DONE]`.
        piece: bytes that are sent at a time; 0 sends each event whole.
    """

    events: list[Event | threading.Event]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    is_cut: bool = False
    piece: int = 0


def refuses(status: int, message: str, **headers: str) -> Script:
    """An answer that is an error, in OpenAI's shape."""
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return Script(events=[body], status=status, headers=headers)


@dataclass(frozen=True)
class Asked:
    """A request for an answer."""

    path: str
    body: dict[str, Any]
    key: str | None


class FakeApi:
    """Runs in a thread while the `with` block does. `answers` is used up first to last."""

    def __init__(self) -> None:
        self.models = [model()]
        self.answers: deque[Script] = deque()
        self.asked: list[Asked] = []
        self.api_key: str | None = None
        self.left = threading.Event()  # the client went before its answer ended
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://127.0.0.1:{self._server.server_port}/"

    def will(self, *events: list[Event] | Event | threading.Event, **options: Any) -> None:
        """Add an answer to the script; lists of events are joined."""
        flat = [each for part in events for each in (part if isinstance(part, list) else [part])]
        self.answers.append(Script(events=flat, **options))

    def __enter__(self) -> FakeApi:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler_for(api: FakeApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/v1/models":
                if self._is_let_in():
                    self._send_json(200, {"object": "list", "data": api.models})
                return
            file = WEB / ("index.html" if path == "/" else path.removeprefix("/"))
            if not file.resolve().is_relative_to(WEB) or not file.is_file():
                self._send_json(404, {"error": {"message": f"there is nothing at {path}"}})
                return
            kind = "font/woff2" if file.suffix == ".woff2" else mimetypes.guess_type(file.name)[0]
            self._begin(200, {"Content-Type": kind or "text/plain", "Content-Security-Policy": POLICY})
            self.wfile.write(file.read_bytes())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self._is_let_in():
                return
            api.asked.append(Asked(self.path, body, self.headers["Authorization"]))
            script = api.answers.popleft() if api.answers else Script(events=[*says("Well."), *ends()])
            if script.status != 200:
                self._send_json(script.status, script.events[0], script.headers)
                return
            self._begin(200, {"Content-Type": "text/event-stream", **script.headers})
            try:
                self._play(script)
            except (BrokenPipeError, ConnectionResetError):
                api.left.set()

        def _play(self, script: Script) -> None:
            for event in script.events:
                if isinstance(event, threading.Event):
                    while not event.wait(0.02):
                        self._write(b": still working\n\n", 0)  # notices a client that has left
                else:
                    self._write(f"data: {json.dumps(event, ensure_ascii=False)}\r\n\r\n".encode(), script.piece)
            if not script.is_cut:
                self._write(b"data: [DONE]\n\n", script.piece)

        def _write(self, data: bytes, piece: int) -> None:
            for start in range(0, len(data), piece or len(data)):
                self.wfile.write(data[start : start + (piece or len(data))])
                self.wfile.flush()
                if piece:
                    time.sleep(0.001)  # so that the pieces arrive as pieces

        def _is_let_in(self) -> bool:
            if api.api_key is None or self.headers["Authorization"] == f"Bearer {api.api_key}":
                return True
            self._send_json(401, {"error": {"message": "the API key is missing or wrong", "code": "invalid_api_key"}})
            return False

        def _send_json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
            self._begin(status, {"Content-Type": "application/json", **(headers or {})})
            self.wfile.write(json.dumps(value).encode())

        def _begin(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

    return Handler
