"""What an evaluation found: every item, the totals, and the files that hold both."""

from __future__ import annotations

from pathlib import Path

import msgspec

from openbook.core.files import atomic_directory, require_absent
from openbook.evals.statistics import Interval, wilson_interval

SUMMARY_FILE = "summary.json"


class Item(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One problem and what the model made of it. A field at its default is left out of the file."""

    task: str
    difficulty: str
    seed: int  # the problem is a function of task, difficulty and this
    problem: str
    thinking: str
    answer: str | None  # as scored; None if the reply holds no answer
    reply: str | None = None  # everything behind the thinking, as spoken; None where that is the answer
    score: float  # 0.0 to 1.0, by reasoning-gym's scorer
    prompt_tokens: int
    tokens: int  # generated, thinking included
    finish_reason: str | None = "stop"  # None: the problem was not put to the model, see `error`
    error: str | None = None


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Figures over some items.

    `accuracy` is strict: the share of items with a score of 1.0 (or more). `interval` is its 95% Wilson interval.
    `mean_score` is the mean of the scores, in which a scorer's partial marks count.
    """

    items: int
    correct: int
    accuracy: float
    interval: Interval
    mean_score: float
    mean_tokens: float

    @classmethod
    def of(cls, items: list[Item]) -> Totals:
        """The figures over `items`, of which there is at least one."""
        correct = sum(item.score >= 1.0 for item in items)
        return cls(
            items=len(items),
            correct=correct,
            accuracy=correct / len(items),
            interval=wilson_interval(correct, len(items)),
            mean_score=sum(item.score for item in items) / len(items),
            mean_tokens=sum(item.tokens for item in items) / len(items),
        )


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the scores depend on, besides the weights."""

    model: str
    tasks: list[str]
    difficulty: str
    seed: int
    samples: int
    effort: str
    prompt_style: str
    temperature: float
    max_tokens: int | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one evaluation."""

    settings: Settings
    items: list[Item]  # by task, then by seed
    seconds: float

    @property
    def totals(self) -> Totals:
        """Figures over all items."""
        return Totals.of(self.items)

    @property
    def accuracy(self) -> float:
        """Share of items with a score of 1.0."""
        return self.totals.accuracy

    @property
    def interval(self) -> Interval:
        """95% Wilson interval of `accuracy`."""
        return self.totals.interval

    @property
    def by_task(self) -> dict[str, Totals]:
        """Figures of each task."""
        return {task: Totals.of(self.items_of(task)) for task in self.settings.tasks}

    def items_of(self, task: str) -> list[Item]:
        """The items of one task, by seed."""
        return [item for item in self.items if item.task == task]

    def summary(self) -> dict[str, object]:
        """Settings and figures, without the items, ready for JSON."""
        return {
            "settings": msgspec.to_builtins(self.settings),
            "totals": _figures(self.totals),
            "tasks": {task: _figures(totals) for task, totals in self.by_task.items()},
            "seconds": round(self.seconds, 3),
        }


def write_report(report: Report, out: Path) -> None:
    """Write `summary.json` and `<task>.jsonl`, one line an item, into the new folder `out`; all of it or nothing.

    Raises:
        UserError: `out` exists, or cannot be written to.
    """
    require_absent(out)
    encode = msgspec.json.encode
    with atomic_directory(out) as partial:
        (partial / SUMMARY_FILE).write_bytes(msgspec.json.format(encode(report.summary()), indent=2) + b"\n")
        for task in report.settings.tasks:
            lines = b"".join(encode(item) + b"\n" for item in report.items_of(task))
            (partial / f"{task}.jsonl").write_bytes(lines)


def _figures(totals: Totals) -> dict[str, object]:
    values: dict[str, object] = msgspec.to_builtins(totals)
    values["interval"] = [round(bound, 6) for bound in totals.interval]
    return values
