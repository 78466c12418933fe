"""What an engine's client and the process that computes say to each other, as msgpack.

Requests and events are the dataclasses that they are everywhere, numpy arrays travel as bytes. Every question has a
number, by which its answers are known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from openbook.core.errors import UserError
from openbook.engine.choices import Profile
from openbook.engine.client import EngineFullError
from openbook.engine.engine import EngineSettings
from openbook.engine.events import EngineStats, SequenceEvent
from openbook.engine.request import Request
from openbook.engine.start import LoadOptions


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One message; its first element says which."""


class Launch(Message, frozen=True):
    """To a new process: what to load, and the number of threads to compute with."""

    model: str
    options: LoadOptions
    settings: EngineSettings
    num_threads: int


class Ready(Message, frozen=True):
    """The answer to `Launch`: the model is loaded."""

    profile: Profile
    max_model_len: int
    num_blocks: int
    adapters: list[str]


class Submit(Message, frozen=True):
    """Run a request."""

    number: int
    request: Request


class Cancel(Message, frozen=True):
    """Nobody wants the request, or the embeddings, of that number any more."""

    number: int


class Embed(Message, frozen=True):
    """See `EngineClient.embed`."""

    number: int
    prompts: list[list[int]]
    adapter: str | None


class AskStats(Message, frozen=True):
    """See `EngineClient.stats`."""

    number: int


class LoadAdapter(Message, frozen=True):
    """See `EngineClient.load_adapter`."""

    number: int
    name: str
    path: str


class UnloadAdapter(Message, frozen=True):
    """See `EngineClient.unload_adapter`."""

    number: int
    name: str


class Close(Message, frozen=True):
    """See `EngineClient.close`; the process then ends."""

    deadline_s: float


class Events(Message, frozen=True):
    """What one step added, each event behind the number of its request."""

    events: list[tuple[int, SequenceEvent]]


class Done(Message, frozen=True):
    """The answer to `AskStats` (with them), `Embed` (with the embeddings), `LoadAdapter` or `UnloadAdapter`."""

    number: int
    stats: EngineStats | None = None
    embeddings: NDArray[np.float32] | None = None


class Failed(Message, frozen=True):
    """An exception in place of an answer.

    kind: "user" for a UserError, "full" for an EngineFullError, whose two numbers follow, "bug" for all others.
    """

    number: int
    kind: Literal["user", "full", "bug"]
    text: str
    num_waiting: int = 0
    retry_after_s: int = 0


ToWorker = Launch | Submit | Embed | Cancel | AskStats | LoadAdapter | UnloadAdapter | Close
FromWorker = Ready | Events | Done | Failed


class WorkerBugError(Exception):
    """Something in the other process failed that should not have; its log has the traceback."""


def _encode_other(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} has no form as a message")


def _decode_other(kind: Any, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    dtype, shape, data = value  # msgspec asks for nothing but what it does not know: arrays
    return np.frombuffer(data, dtype=dtype).reshape(shape).copy()  # torch wants arrays that can be written to


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_other)
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker, dec_hook=_decode_other)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker, dec_hook=_decode_other)


def encode(message: Message) -> bytes:
    """The bytes of a message.

    Raises:
        UnicodeEncodeError: a text holds half of a surrogate pair.
        OverflowError: a number takes more than 64 bits.
    """
    return _encoder.encode(message)


def decode_to_worker(data: bytes) -> ToWorker:
    """What the client says."""
    return _to_worker.decode(data)


def decode_from_worker(data: bytes) -> FromWorker:
    """What the process says that computes."""
    return _from_worker.decode(data)


def as_failed(number: int, error: BaseException) -> Failed:
    """An exception as a message."""
    text = " ".join(str(error).encode(errors="replace").decode().split())
    if isinstance(error, UserError):
        return Failed(number, "user", text)
    if isinstance(error, EngineFullError):
        return Failed(number, "full", text, error.num_waiting, error.retry_after_s)
    return Failed(number, "bug", f"{type(error).__name__}: {text}")


def as_error(failed: Failed) -> Exception:
    """The exception that a message stands for, of the type that it had where that matters."""
    if failed.kind == "user":
        return UserError(failed.text)
    if failed.kind == "full":
        return EngineFullError(failed.num_waiting, failed.retry_after_s)
    return WorkerBugError(failed.text)
