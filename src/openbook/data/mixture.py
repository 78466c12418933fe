"""Which problem a document holds: a pure function of the stage's seed and the document's index."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import msgspec

from openbook.core.config import Config
from openbook.core.seeding import TRAIN_SEED_START, derive_seed
from openbook.tasks.base import EFFORTS, Difficulty, Effort

# Each document has this many seeds of its own: the first are for its problem (one that is refused takes the next), the
# last for the questions before it.
_SEEDS_A_DOCUMENT = 48
NUM_HISTORY_ATTEMPTS = 8
NUM_ATTEMPTS = _SEEDS_A_DOCUMENT - 2 * NUM_HISTORY_ATTEMPTS
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
        if wrong := sorted(self.params.keys() & {"seed", "size", "difficulty"}):
            raise ValueError(f"params has {wrong[0]}, expected parameters of the task alone")
        if not 0 < self.weight < math.inf:
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
        history_share: share of the documents that begin with answered questions.
    """

    def __init__(self, entries: Sequence[MixtureEntry], seed: int, history_share: float = 0.0) -> None:
        self.entries, self.seed, self.history_share = tuple(entries), seed, history_share
        # The order of efforts is ours, so that the order of keys in a recipe decides nothing.
        self._choices = [
            (Choice(entry, effort), entry.weight * entry.efforts[effort] / math.fsum(entry.efforts.values()))
            for entry in self.entries
            for effort in EFFORTS
            if entry.efforts.get(effort)
        ]
        self._bounds = list(accumulate(share for _, share in self._choices))
        self._first_seed = derive_seed(seed, "problems") % _NUM_SEEDS

    def choose(self, index: int) -> Choice:
        """Task and effort of document `index`."""
        return self._at(derive_seed(self.seed, "choice", index) / 2**63)

    def history(self, index: int, attempt: int) -> list[tuple[MixtureEntry, int]]:
        """Entry and problem seed of each question before that of document `index`, mostly none, at most two.

        Args:
            attempt: as for `problem_seed`; from NUM_HISTORY_ATTEMPTS on there is no history.
        """
        point = derive_seed(self.seed, "history", index) / 2**63
        if attempt >= NUM_HISTORY_ATTEMPTS or point >= self.history_share:
            return []
        num_turns = 1 if point < self.history_share * 2 / 3 else 2
        first = NUM_ATTEMPTS + 2 * attempt
        return [
            (
                self._at(derive_seed(self.seed, "history", index, attempt, turn) / 2**63).entry,
                self._seed_of(index, first + turn),
            )
            for turn in range(num_turns)
        ]

    def problem_seed(self, index: int, attempt: int) -> int:
        """Seed of the problem of document `index`: of training, and no other document of the mixture has it.

        Args:
            attempt: 0 up to NUM_ATTEMPTS - 1; the first whose problem is not refused counts.
        """
        return self._seed_of(index, attempt)

    def _at(self, point: float) -> Choice:
        """The choice at `point`, 0 to 1, of the weights' sum."""
        return self._choices[min(bisect_right(self._bounds, point * self._bounds[-1]), len(self._choices) - 1)][0]

    def _seed_of(self, index: int, place: int) -> int:
        return TRAIN_SEED_START + (self._first_seed + index * _SEEDS_A_DOCUMENT + place) % _NUM_SEEDS
