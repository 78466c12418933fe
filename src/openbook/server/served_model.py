"""The models that a server has, and how a client's `model` finds one."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from typing import Any, NamedTuple

from openbook.core.errors import UserError
from openbook.engine.choices import Profile
from openbook.engine.client import EngineClient
from openbook.engine.receipt import ReceiptMaker
from openbook.server.errors import ApiError
from openbook.server.logprobs import TokenTexts
from openbook.tokenizer.chat import Chat
from openbook.tokenizer.tokenizer import Tokenizer

ADAPTER_MARK = ":"  # between a model's name and its adapter's
_VERSION = metadata.version("openbook")
EFFORTS = ("low", "medium", "high")


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What holds where a request says nothing; see `SamplingParams`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One model and the engine that computes it.

    Args:
        name: what `/v1/models` calls it.
        aliases: other names that clients may use.
        speaker: renders conversations, and holds the tokenizer; of a base model the tokenizer alone.
        max_model_len: most tokens of prompt and answer together.
        sees_images: whether it reads images in messages.
        tasks: names of the tasks it was trained on, for one of ours.
        receipts: writes those of its answers; None where nobody could compute them again.
        created_s: Unix time.
    """

    name: str
    speaker: Chat | Tokenizer
    engine: EngineClient
    max_model_len: int
    profile: Profile
    aliases: tuple[str, ...] = ()
    sees_images: bool = False
    tasks: tuple[str, ...] = ()
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    receipts: ReceiptMaker | None = None
    created_s: int = field(default_factory=lambda: int(time.time()))

    @property
    def chat(self) -> Chat | None:
        """Renders conversations; None for a base model."""
        return self.speaker if isinstance(self.speaker, Chat) else None

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        return self.speaker.tokenizer if isinstance(self.speaker, Chat) else self.speaker

    @property
    def is_base(self) -> bool:
        """Whether it continues texts and holds no conversation."""
        return self.chat is None

    @property
    def fingerprint(self) -> str:
        """For `system_fingerprint`: what the arithmetic depends on beside the weights."""
        return f"openbook-{_VERSION}-{self.profile}"

    @cached_property
    def token_texts(self) -> TokenTexts:
        """What its tokens are called; takes a moment the first time."""
        return TokenTexts(self.tokenizer)

    @cached_property
    def efforts(self) -> list[str]:
        """The efforts that make a difference to it."""
        template = self.chat.template if self.chat else ""
        if "reasoning_effort" in template:
            return list(EFFORTS)
        return ["low", "medium"] if re.search(r"\b(enable_)?thinking\b", template) else []

    def describe(self) -> dict[str, Any]:
        """What the page wants to know: the `openbook` object of `/v1/models`."""
        marks = self.chat.format if self.chat else None
        return {
            "max_model_len": self.max_model_len,
            "is_base": self.is_base,
            "has_thinking": marks is not None and (marks.thinking or marks.harmony) is not None,
            "has_tools": marks is not None and (marks.tools or marks.harmony) is not None,
            "sees_images": self.sees_images,
            "efforts": self.efforts,
            "adapters": self.engine.adapters,
            "profile": self.profile,
            "tasks": list(self.tasks),
        }


class Target(NamedTuple):
    """What a request's `model` means."""

    name: str  # in full, as the answer repeats it
    model: ServedModel
    adapter: str | None


class ServedModels:
    """All models of a server.

    Raises:
        UserError: there is none, or two share a name.
    """

    def __init__(self, models: Sequence[ServedModel]) -> None:
        names = [name for model in models for name in (model.name, *model.aliases)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"two served models are called {twice!r}: give them names with --served-name")
        if not names:
            raise UserError("there is no model to serve: expected at least one")
        self._models = tuple(models)

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    @property
    def first(self) -> ServedModel:
        """The one that is meant where an endpoint may be asked without a name."""
        return self._models[0]

    def targets(self) -> Iterator[Target]:
        """Every model, followed by its adapters."""
        for model in self._models:
            yield Target(model.name, model, None)
            for adapter in model.engine.adapters:
                yield Target(f"{model.name}{ADAPTER_MARK}{adapter}", model, adapter)

    def find(self, name: str) -> Target:
        """The model of that name or alias, or one with an adapter (`name:adapter`).

        Raises:
            ApiError: 404, with the nearest known name.
        """
        for target in self.targets():
            aliases = target.model.aliases
            if target.adapter is not None:
                aliases = tuple(f"{alias}{ADAPTER_MARK}{target.adapter}" for alias in aliases)
            if name == target.name or name in aliases:
                return target
        known = [target.name for target in self.targets()]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4) or known[:1]
        raise ApiError(
            404,
            f"the model {name[:200]!r} does not exist: did you mean {nearest[0]!r}? /v1/models lists all",
            param="model",
            code="model_not_found",
        )
