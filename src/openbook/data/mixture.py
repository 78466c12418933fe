"""Which problem a document holds: a pure function of the stage's seed and the document's index."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import msgspec

from openbook.core.config import Config
from openbook.core.seeding import TRAIN_SEED_START, derive_seed
from openbook.tasks.base import EFFORTS, Difficulty, Effort

# A document whose problem is refused takes the next of its own seeds.
NUM_ATTEMPTS = 32
# Some generators seed numpy, which takes 32 bits.
_NUM_SEEDS = 2**32 - TRAIN_SEED_START


class MixtureEntry(Config, frozen=True, kw_only=True):
    """One kind of document.

    Attributes:
        task: name of a task.
        difficulty: easy or hard.
        weight: share of the documents, relative to the other entries.
        params: single parameters of the task that replace the difficulty's (a gentler curriculum).
        efforts: share of each reasoning effort, relative to the others.
    """

    task: str
    difficulty: Difficulty = "easy"
    weight: float = 1.0
    params: dict[str, Any] = msgspec.field(default_factory=dict)
    efforts: dict[Effort, float] = msgspec.field(default_factory=lambda: {"medium": 1.0})

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight is {self.weight}, expected more than 0")
        if any(share < 0 for share in self.efforts.values()) or not sum(self.efforts.values()) > 0:
            raise ValueError(f"efforts are {self.efforts}, expected shares from 0 up, at least one above 0")


class Choice(NamedTuple):
    """What one document shall be."""

    entry: MixtureEntry
    effort: Effort


class Mixture:
    """Entries mixed by weight.

    Args:
        entries: at least one.
        seed: of the stage.
    """

    def __init__(self, entries: Sequence[MixtureEntry], seed: int) -> None:
        self.entries, self.seed = tuple(entries), seed
        # The order of efforts is ours, so that the order of keys in a recipe decides nothing.
        self._choices = [
            (Choice(entry, effort), entry.weight * entry.efforts[effort] / sum(entry.efforts.values()))
            for entry in self.entries
            for effort in EFFORTS
            if entry.efforts.get(effort)
        ]
        self._bounds = list(accumulate(share for _, share in self._choices))
        self._first_seed = derive_seed(seed, "problems") % _NUM_SEEDS

    def choose(self, index: int) -> Choice:
        """Task and effort of document `index`."""
        point = derive_seed(self.seed, "choice", index) / 2**63 * self._bounds[-1]
        return self._choices[min(bisect_right(self._bounds, point), len(self._choices) - 1)][0]

    def problem_seed(self, index: int, attempt: int) -> int:
        """Seed of the problem of document `index`: of training, and no other document of the mixture has it.

        Args:
            attempt: 0 up to NUM_ATTEMPTS - 1; the first whose problem is not refused counts.
        """
        return TRAIN_SEED_START + (self._first_seed + index * NUM_ATTEMPTS + attempt) % _NUM_SEEDS
