"""The engine as a server sees it, whether it computes in a thread, in another process or on another machine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from openbook.engine.events import EngineStats, SequenceEvent
from openbook.engine.request import Request


class EngineFullError(Exception):
    """So many requests wait that no more are taken; `retry_after_s` is a guess at when some will be."""

    def __init__(self, num_waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{num_waiting} requests are waiting: try again in {retry_after_s} s")
        self.num_waiting, self.retry_after_s = num_waiting, retry_after_s


class EngineDownError(EngineFullError):
    """The engine, in another process, has ended and is being started again; no answer to the request had begun."""

    def __init__(self, reason: str, retry_after_s: int) -> None:
        Exception.__init__(self, f"{reason}: try again in {retry_after_s} s")
        self.num_waiting, self.retry_after_s = 0, retry_after_s


class EngineClient(Protocol):
    """Takes requests and gives their events. All methods are called on one event loop."""

    def submit(self, request: Request) -> AsyncIterator[SequenceEvent]:
        """The events of all its sequences, each of which ends with one that has a finish reason.

        Closing the iterator (or cancelling the task that reads it) cancels the request at once.

        Raises:
            EngineFullError: before the first event.
            UserError: before the first event, the prompt is empty or past the context, or an adapter, constraint or
                token id is unknown or wrong.
        """

    async def embed(self, prompts: Sequence[Sequence[int]], adapter: str | None = None) -> NDArray[np.float32]:
        """The mean of each prompt's final hidden states, [prompts, hidden_size]; the bits do not depend on the company.

        Cancelling the task that waits for it ends the work.

        Raises:
            EngineFullError: too many wait already, or the engine is closed.
            UserError: a prompt is empty or past the context, or a token id or the adapter is unknown.
        """

    async def stats(self) -> EngineStats:
        """How busy it is now."""

    async def load_adapter(self, name: str, path: str) -> None:
        """Load an adapter in PEFT's format under a name.

        Raises:
            UserError: there is one of that name, or it does not fit the model.
        """

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter, once no running request uses it.

        Raises:
            UserError: there is none of that name.
        """

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are loaded."""

    async def close(self, deadline_s: float) -> None:
        """Let what is running finish for so long, then cancel the rest."""
