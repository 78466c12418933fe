"""Servers for tests: an engine that says what a test wants, behind a real socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2
import openai

from openbook.core.errors import UserError
from openbook.engine.events import EngineStats, SequenceEvent, TokenLogprob
from openbook.engine.request import Request
from openbook.engine.transcript import Transcript
from openbook.server.app import create_app
from openbook.server.run import Server, listen, url_of
from openbook.server.served_model import ServedModel
from openbook.server.settings import ServerSettings
from openbook.tokenizer.chat import Chat
from openbook.tokenizer.tokenizer import Tokenizer

CONTEXT = 512


@dataclass
class StubEngine:
    """An `EngineClient` that answers each request with a text, a token at a time.

    Args:
        chat: the model's.
        reply: a request's answer; `<think>` and `</think>` in it become control tokens.
        pause_s: before each token.
        failure: what happens instead of an answer.
    """

    chat: Chat
    reply: Callable[[Request], str] = lambda request: "<think>\nhm\n</think>\nyes"
    pause_s: float = 0.0
    failure: Exception | None = None
    is_holding: bool = False  # give no token until it is false again
    requests: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    loaded: dict[str, str] = field(default_factory=dict)
    is_closing: bool = False

    async def submit(self, request: Request) -> AsyncIterator[SequenceEvent]:
        if self.failure is not None:
            raise self.failure
        self.requests.append(request)
        num_open = request.num_samples
        try:
            for index in range(request.num_samples):
                async for event in self._say(request, index):
                    num_open -= event.finish_reason is not None
                    yield event
        finally:
            if num_open:
                self.cancelled.append(request.id)

    async def _say(self, request: Request, index: int) -> AsyncIterator[SequenceEvent]:
        tokenizer, params = self.chat.tokenizer, request.params
        transcript = Transcript(
            tokenizer,
            params.stop,
            chat_format=self.chat.format,
            prompt_ids=request.prompt_ids,
            tool_names=request.tool_names,
            is_text=request.is_text,
        )
        ids = [*speak(tokenizer, self.reply(request)), min(tokenizer.stop_ids)]
        limit = request.num_new_tokens(CONTEXT)
        for number, token_id in enumerate(ids, 1):
            while self.is_holding and not self.is_closing:
                await asyncio.sleep(0.01)
            await asyncio.sleep(self.pause_s)
            if self.is_closing:
                yield SequenceEvent(request_id=request.id, index=index, finish_reason="cancelled")
                return
            pieces = transcript.push(token_id)
            reason: Any = "stop" if transcript.is_stopped else "length" if number == limit else None
            if reason == "length":
                pieces += transcript.close()
            event = SequenceEvent(
                request_id=request.id,
                index=index,
                token_ids=[token_id],
                pieces=pieces,
                tool_calls=transcript.tool_calls if reason else [],
                cached_tokens=3,
                finish_reason=reason,
            )
            if (num_top := params.num_logprobs) is not None:
                top = [(token_id + rank, -0.5 - rank) for rank in range(num_top)]
                event = replace(event, logprobs=[TokenLogprob(token_id=token_id, logprob=-0.5, top=top)])
            if params.num_prompt_logprobs is not None and number == 1:
                found = [TokenLogprob(token_id=token, logprob=-1.0) for token in request.prompt_ids[1:]]
                event = replace(event, prompt_logprobs=found)
            yield event
            if reason:
                return

    async def stats(self) -> EngineStats:
        numbers = range(1, 14)
        return EngineStats(**dict(zip(EngineStats.__annotations__, numbers, strict=True)))

    @property
    def adapters(self) -> list[str]:
        return list(self.loaded)

    async def load_adapter(self, name: str, path: str) -> None:
        if name in self.loaded:
            raise UserError(f"there is an adapter {name!r} already: unload it first")
        self.loaded[name] = path

    async def unload_adapter(self, name: str) -> None:
        if name not in self.loaded:
            raise UserError(f"there is no adapter {name!r}: load it first")
        del self.loaded[name]

    async def close(self, deadline_s: float) -> None:
        await asyncio.sleep(deadline_s if self.is_holding or self.pause_s else 0)
        self.is_closing = True


def speak(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text in which control tokens are meant."""
    assert tokenizer.control_pattern is not None
    ids: list[int] = []
    for index, piece in enumerate(tokenizer.control_pattern.split(text)):
        ids += [tokenizer.special_id(piece)] if index % 2 else tokenizer.encode(piece)
    return ids


class LiveServer:
    """A server in a thread, on a free port of 127.0.0.1.

    Args:
        served: its models.
        settings: see `ServerSettings`.
    """

    def __init__(self, *served: ServedModel, **settings: Any) -> None:
        self.settings = ServerSettings(**{"drain_s": 0.2, **settings})
        self.app = create_app(served, self.settings)
        listener = listen("127.0.0.1", 0)
        self.url = url_of(listener)
        self.port = listener.getsockname()[1]
        ready = threading.Event()
        self.server = Server(self.app, ready.set)
        self.server.capture_signals = _no_signals  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self.server.run, args=([listener],))
        self._thread.start()
        assert ready.wait(10)

    def client(self, **options: Any) -> httpx2.Client:
        """A plain client."""
        return httpx2.Client(base_url=self.url, timeout=20, **options)

    def openai(self, **options: Any) -> openai.OpenAI:
        """The official client."""
        options = {"api_key": "none", "max_retries": 0, "timeout": 20, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def stop(self) -> None:
        """As SIGTERM does."""
        self.server.should_exit = True
        self._thread.join(15)
        assert not self._thread.is_alive()


class _no_signals:  # noqa: N801
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...
