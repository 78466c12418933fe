"""Adapters in the native decoder: several at once, each for the sequences of a step that ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from openbook.models.adapter import Adapter, require_loaded, require_new, unfitting

if TYPE_CHECKING:
    from openbook.ops._native import Decoder


class NativeAdapters:
    """Those that are loaded into a decoder. Not to be changed while a step runs."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._numbers: dict[str, int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters that are loaded."""
        return tuple(self._numbers)

    def add(self, adapter: Adapter) -> None:
        """Load an adapter.

        Raises:
            UserError: another one has its name, or it updates a matrix that this model has not.
        """
        require_new(adapter.name, self.names)
        number = min(set(range(len(self._numbers) + 1)) - set(self._numbers.values()))
        try:
            for matrix, updates in adapter.matrices.items():
                parts = [(update.first_row, update.a, update.b) for update in updates]
                self._decoder.set_low_rank(number, f"{matrix}.weight", parts)
        except ValueError as error:
            self._decoder.remove_adapter(number)
            raise unfitting(adapter.name, matrix) from error
        self._numbers[adapter.name] = number

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            UserError: there is none of that name.
        """
        require_loaded(name, self.names)
        self._decoder.remove_adapter(self._numbers.pop(name))

    def of_sequences(self, adapters: Sequence[str | None]) -> NDArray[np.int32] | None:
        """What `Decoder.step` takes as `adapters`, int32 [S]; None where no sequence has one.

        Args:
            adapters: that of each sequence, [S]; None for none. Empty: no sequence has one.

        Raises:
            UserError: an adapter is not loaded.
        """
        if all(name is None for name in adapters):
            return None
        for name in {name for name in adapters if name is not None}:
            require_loaded(name, self.names)
        return np.array([-1 if name is None else self._numbers[name] for name in adapters], np.int32)
