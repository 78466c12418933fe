"""A server on a free port, and its clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest
from server_setup import CONTEXT, LiveServer, StubEngine

from openbook.server.served_model import ServedModel
from openbook.tokenizer.chat import Chat, default_template
from openbook.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tiny_chat(tiny_tokenizer: Tokenizer) -> Chat:
    """Our template with 274 tokens."""
    return Chat(tiny_tokenizer, default_template())


@pytest.fixture
def stub(tiny_chat: Chat) -> StubEngine:
    """An engine to be scripted."""
    return StubEngine(tiny_chat)


@pytest.fixture
def start() -> Iterator[Callable[..., LiveServer]]:
    """Starts servers, and stops them after the test."""
    servers: list[LiveServer] = []

    def start(*engines: StubEngine, is_base: bool = False, **settings: Any) -> LiveServer:
        served = [
            ServedModel(
                name=name,
                aliases=(f"{name}-alias",),
                speaker=engine.chat.tokenizer if is_base else engine.chat,
                engine=engine,
                max_model_len=CONTEXT,
                profile="exact",
                tasks=("gcd",),
            )
            for name, engine in zip(("tiny", "other"), engines, strict=False)
        ]
        servers.append(LiveServer(*served, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def server(start: Callable[..., LiveServer], stub: StubEngine) -> LiveServer:
    """A server without keys over `stub`, whose model is called tiny."""
    return start(stub)


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx2.Client]:
    """A plain client of `server`."""
    with server.client() as client:
        yield client


@pytest.fixture
def sdk(server: LiveServer) -> Iterator[openai.OpenAI]:
    """The official client of `server`."""
    with server.openai() as client:
        yield client
