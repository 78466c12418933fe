"""What an adapter is: low-rank updates of a model's matrices (LoRA, arXiv 2106.09685). No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openbook.core.errors import UserError, unknown_name


@dataclass(frozen=True, eq=False)
class LowRank:
    """What is added to some outputs of one matrix: outputs `first_row` and on get b (a x).

    a: float32 [rank, inputs]. b: float32 [outputs, rank], the adapter's scale multiplied in.
    """

    first_row: int
    a: NDArray[np.float32]
    b: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter ready for a model.

    name: what requests call it. digest: SHA-256 of all that it computes with, 64 hex digits: equal for equal numbers,
    whatever type a file holds them in. matrices: by the name of the `Linear` in our model, the updates of it, whose
    rows ascend and do not overlap: q, k and v of `model.layers.0.self_attn.qkv_proj` have one each.
    """

    name: str
    digest: str
    matrices: Mapping[str, tuple[LowRank, ...]]

    @property
    def max_rank(self) -> int:
        """The largest rank of its updates."""
        return max(len(update.a) for updates in self.matrices.values() for update in updates)

    @property
    def num_bytes(self) -> int:
        """Memory of its numbers."""
        return sum(update.a.nbytes + update.b.nbytes for updates in self.matrices.values() for update in updates)


def unfitting(adapter: str, matrix: str) -> UserError:
    """The refusal of an adapter that was read for a model of another shape."""
    return UserError(
        f"the adapter {adapter} updates {matrix}, which this model has not in that shape: read it for this model"
    )


def require_new(name: str, names: Sequence[str]) -> None:
    """Check that no loaded adapter is called `name`.

    Raises:
        UserError: one is.
    """
    if name in names:
        raise UserError(f"an adapter {name} is loaded already: unload it first, or give another name")


def require_loaded(name: str, names: Sequence[str]) -> None:
    """Check that an adapter is loaded.

    Raises:
        UserError: it is not, with the nearest one that is.
    """
    if name not in names:
        raise unknown_name("adapter", name, names, f"loaded are {', '.join(names) or 'none'}; load it first")
