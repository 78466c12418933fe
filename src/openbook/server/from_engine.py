"""From a started engine to a served model: what it was trained on, what it sees, how its authors sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from openbook.core.errors import UserError
from openbook.core.files import read_json
from openbook.engine.choices import Profile
from openbook.engine.client import EngineClient
from openbook.engine.provenance import read_tasks
from openbook.engine.receipt import ReceiptMaker
from openbook.server.served_model import SamplingDefaults, ServedModel
from openbook.tokenizer.chat import Chat
from openbook.tokenizer.images import ImageMarks
from openbook.tokenizer.tokenizer import Tokenizer

_GENERATION_FILE = "generation_config.json"
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


class LimitedEngine(EngineClient, Protocol):
    """An engine that knows its longest sequence."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""


class Started(Protocol):
    """What `start_engine` and `start_engines` return."""

    @property
    def name(self) -> str:
        """What to call the model."""

    @property
    def folder(self) -> Path:
        """Where its files lie, a folder or a GGUF file."""

    @property
    def chat(self) -> Chat | Tokenizer:
        """Renders conversations; of a base model the tokenizer alone."""

    @property
    def profile(self) -> Profile:
        """The numerics profile."""

    @property
    def engine(self) -> LimitedEngine:
        """Computes."""

    @property
    def receipts(self) -> ReceiptMaker:
        """Writes those of its answers."""


def served_model(started: Started, names: tuple[str, ...] = ()) -> ServedModel:
    """A started engine as a served model.

    Args:
        names: what clients may call it, the first in `/v1/models`; none: its own.

    Raises:
        UserError: its recipe or generation_config.json is damaged.
    """
    name, *aliases = names or (started.name,)
    return ServedModel(
        name=name,
        aliases=tuple(aliases),
        speaker=started.chat,
        engine=started.engine,
        max_model_len=started.engine.max_model_len,
        profile=started.profile,
        sees_images=_sees_images(started.folder, started.chat),
        tasks=tuple(read_tasks(started.folder)),
        defaults=sampling_defaults(started.folder),
        receipts=started.receipts,
    )


def sampling_defaults(folder: Path) -> SamplingDefaults:
    """How a model's authors recommend to sample, from its generation_config.json; else the OpenAI API's defaults.

    Raises:
        UserError: the file is damaged, or has a value of the wrong type.
    """
    path = folder / _GENERATION_FILE
    values = read_json(path, "generation configuration") if path.is_file() else {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object: restore it from the model's source")
    if values.get("do_sample") is False:
        return SamplingDefaults(temperature=0.0)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given: dict[str, Any] = {name: values[name] for name in names if values.get(name) is not None}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise UserError(f"{path}: {name} is {value!r}, expected a number: restore it from the model's source")
    return SamplingDefaults(**given)


def _sees_images(folder: Path, chat: Chat | Tokenizer) -> bool:
    if not isinstance(chat, Chat) or ImageMarks().token not in chat.tokenizer.control_tokens:
        return False
    return any((folder / name).is_file() for name in _IMAGE_FILES)
