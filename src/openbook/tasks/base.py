"""What a task is: a problem from a seed, a worked solution of our own, a score for any answer.

Problems and scorers come from the reasoning-gym package; the worked solutions are ours, and are the open data.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

from openbook.core.errors import UserError
from openbook.core.seeding import TRAIN_SEED_START as TRAIN_SEED_START

Effort = Literal["low", "medium", "high"]
Difficulty = Literal["easy", "hard"]
EFFORTS: tuple[Effort, ...] = ("low", "medium", "high")
DIFFICULTIES: tuple[Difficulty, ...] = ("easy", "hard")

# The published test sets: items of seed 45 to 94, easy and hard (shared/BENCHMARK.md).
PUBLISHED_SEED = 45
NUM_PUBLISHED_ITEMS = 50


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem. `entry` is the reasoning-gym item (question, answer, metadata), which its scorer needs."""

    task: str
    difficulty: Difficulty
    seed: int
    question: str
    entry: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Work:
    """A worked solution in parts: the steps that lead to the answer, a check of it, and the answer itself."""

    steps: str
    check: str
    answer: str

    def reasoning(self, effort: Effort) -> str:
        """What goes between the thinking marks: nothing (low), the steps (medium), steps and check (high)."""
        if effort == "low":
            return ""
        return self.steps if effort == "medium" else f"{self.steps}\n{self.check}"


class Task(ABC):
    """One kind of problem. Subclasses set the class variables and write `work`.

    A problem is a function of (seed, difficulty, params) alone: the item `Random(seed)` of reasoning-gym.
    """

    name: ClassVar[str]  # as in reasoning-gym
    group: ClassVar[str]  # the file it stands in: "arithmetic", "strings", "games"
    summary: ClassVar[str]  # one line for `openbook tasks`
    hard: ClassVar[Mapping[str, Any]]  # parameters of the published hard configuration; easy is the package's default

    def generate(self, seed: int, difficulty: Difficulty = "easy", **params: Any) -> Problem:
        """The problem of `seed`. `params` override single parameters of the difficulty (a gentler curriculum).

        Raises:
            UserError: reasoning-gym does not know a parameter or refuses its value.
        """
        dataset = self._dataset(difficulty, params)
        # Some generators read the global generator's state; a problem must depend on its seed alone.
        random.seed(seed)
        entry = dataset[seed]
        return Problem(task=self.name, difficulty=difficulty, seed=seed, question=entry["question"], entry=entry)

    @abstractmethod
    def work(self, problem: Problem) -> Work:
        """The worked solution: steps in an order that makes each one local, the same on every run."""

    def score(self, problem: Problem, answer: str) -> float:
        """Score of an answer, 0.0 to 1.0, by reasoning-gym's own scorer."""
        return float(self._dataset(problem.difficulty, {}).score_answer(answer=answer, entry=problem.entry))

    def _dataset(self, difficulty: Difficulty, params: Mapping[str, Any]) -> Any:
        values = {**(self.hard if difficulty == "hard" else {}), **params}
        # Lists, as they come from a recipe, cannot be keys of the cache.
        hashable = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return _dataset(self.name, tuple(sorted(hashable.items(), key=lambda item: item[0])))


@lru_cache(maxsize=128)
def _dataset(name: str, params: tuple[tuple[str, Any], ...]) -> Any:
    """A reasoning-gym dataset with seed 0, so that item i is the item of seed i."""
    from reasoning_gym.factory import create_dataset

    try:
        return create_dataset(name, seed=0, size=1, **dict(params))
    except (TypeError, AssertionError, ValueError) as error:
        given = ", ".join(f"{key}={value}" for key, value in params)
        raise UserError(f"task {name} with {given}: {error}; see `openbook tasks {name}` for its parameters") from error
