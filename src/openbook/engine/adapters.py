"""The adapters that a model is served with: read from folders, loaded and unloaded between steps. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from openbook.checkpoint.lora import read_adapter
from openbook.models.adapter import Adapter
from openbook.models.config import ModelConfig


class AdapterPlace(Protocol):
    """Where a runner keeps adapters: `NativeAdapters`, or `ModelAdapters` in torch. Changed between steps only."""

    def add(self, adapter: Adapter) -> None:
        """Load an adapter.

        Raises:
            UserError: another one has its name, or it updates a matrix that this model has not.
        """

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            UserError: there is none of that name.
        """


class ServedAdapters:
    """Adapters by name, in the place where a runner looks for them.

    `read`, `names` and `digest` are for any thread; `add` and `remove` for the one that steps, between two steps.
    """

    def __init__(self, config: ModelConfig, place: AdapterPlace) -> None:
        self._config, self._place = config, place
        self._digests: dict[str, str] = {}
        self._retired: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Those that a request may ask for, in the order in which they were loaded."""
        return [name for name in tuple(self._digests) if name not in self._retired]

    def digest(self, name: str) -> str:
        """See `Adapter.digest`; KeyError if it is not loaded."""
        return self._digests[name]

    def read(self, name: str, path: str) -> Adapter:
        """Read an adapter's folder.

        Raises:
            UserError: it is damaged, or no adapter for this model; see `read_adapter`.
        """
        return read_adapter(Path(path), self._config, name)

    def add(self, adapter: Adapter) -> None:
        """Let sequences use it from the next step on.

        Raises:
            UserError: another one has its name.
        """
        self._place.add(adapter)
        self._digests[adapter.name] = adapter.digest

    def retire(self, name: str) -> None:
        """Offer it to no new request; those that have it keep it."""
        self._retired.add(name)

    def remove(self, name: str) -> None:
        """Free what it takes; no sequence uses it any more.

        Raises:
            UserError: there is none of that name.
        """
        self._place.remove(name)
        del self._digests[name]
        self._retired.discard(name)
