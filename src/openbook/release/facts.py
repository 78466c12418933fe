"""The facts of a release: what the card and the report say, each read from a file of the build."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from openbook.core.errors import UserError
from openbook.core.files import read_bytes, read_json


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """A task the model was trained on."""

    name: str
    summary: str
    documents: int  # training documents over all stages


@dataclass(frozen=True, kw_only=True)
class Score:
    """One task's result in one evaluation; shares are 0.0 to 1.0, the interval is 95%."""

    task: str
    difficulty: str
    effort: str
    seed: int  # of the first problem
    samples: int
    accuracy: float
    low: float
    high: float
    mean_score: float
    mean_tokens: float


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """One stage of training and the data it read."""

    name: str
    steps: int
    trained_tokens: int  # read over all steps, padding not counted
    lr: float  # of the plateau
    final_loss: float  # mean of the last steps, nats a token
    documents: int
    tokens: int  # of the documents, each counted once
    padding_share: float
    tasks: dict[str, int]  # documents of each task
    licenses: dict[str, int]  # documents under each licence
    generators: tuple[str, ...]  # "reasoning-gym 0.1.25"
    refused: int  # problems left out because they equal one of a published test set
    manifest_sha256: str


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """One evaluated problem and what the model said."""

    task: str
    difficulty: str
    effort: str
    seed: int
    problem: str
    thinking: str
    answer: str
    score: float


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """Where and with what the weights were made; an empty value means that the build did not record it.

    isa: the instruction set of the native core, in the exact profile. num_trainers: processes that trained together.
    """

    profile: str
    precision: str
    optimizer: str
    device: str
    is_compiled: bool
    machine: str
    threads: int
    isa: str
    num_trainers: int
    seconds: float
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class ReleaseFacts:
    """Everything that is said about a release."""

    name: str
    description: str
    license: str
    recipe_sha256: str
    weights_sha256: str
    num_parameters: int
    model: dict[str, Any]  # config.json
    row_tokens: int  # longest document in training, in tokens
    tasks: tuple[TaskFacts, ...]
    stages: tuple[StageFacts, ...]
    scores: tuple[Score, ...]
    training: TrainingFacts
    transcripts: tuple[Transcript, ...] = field(default=())

    @property
    def documents(self) -> int:
        """Training documents over all stages."""
        return sum(stage.documents for stage in self.stages)

    @property
    def steps(self) -> int:
        """Steps over all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def trained_tokens(self) -> int:
        """Tokens read over all steps and stages, padding not counted."""
        return sum(stage.trained_tokens for stage in self.stages)


def read_scores(folder: Path) -> tuple[Score, ...]:
    """All scores of the evaluations below `folder`, those of easy problems first; () if there are none.

    Raises:
        UserError: a summary cannot be read or lacks something.
    """
    scores = [score for path in _summaries(folder) for score in _scores_of(path)]
    order = {"easy": 0, "hard": 1, "medium": 0, "high": 1, "low": 2}
    return tuple(sorted(scores, key=lambda score: (order.get(score.difficulty, 9), order.get(score.effort, 9))))


def read_transcripts(folder: Path) -> tuple[Transcript, ...]:
    """From the evaluation at effort medium, or else the first: each task's first item, and its first wrong one.

    Raises:
        UserError: a file of items cannot be read.
    """
    chosen: list[Transcript] = []
    efforts = {path: read_json(path, "evaluation summary")["settings"]["effort"] for path in _summaries(folder)}
    for path, effort in sorted(efforts.items(), key=lambda pair: pair[1] != "medium")[:1]:
        for score in _scores_of(path):
            items = list(_items(path.parent / f"{score.task}.jsonl", effort))
            wrong = next((item for item in items[1:] if item.score < 1.0), None)
            chosen += [item for item in (items[0], wrong if items[0].score >= 1.0 else None) if item]
    return tuple(chosen)


def _summaries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("summary.json"))


def _scores_of(path: Path) -> list[Score]:
    summary = read_json(path, "evaluation summary")
    try:
        settings = summary["settings"]
        return [
            Score(
                task=task,
                difficulty=settings["difficulty"],
                effort=settings["effort"],
                seed=settings["seed"],
                samples=figures["items"],
                accuracy=figures["accuracy"],
                low=figures["interval"][0],
                high=figures["interval"][1],
                mean_score=figures["mean_score"],
                mean_tokens=figures["mean_tokens"],
            )
            for task, figures in summary["tasks"].items()
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"the evaluation summary {path} lacks {error}: run the evaluation again") from error


def _items(path: Path, effort: str) -> Iterator[Transcript]:
    for line in read_bytes(path, "file of items").splitlines():
        try:
            item = msgspec.json.decode(line)
            yield Transcript(
                task=item["task"],
                difficulty=item["difficulty"],
                effort=effort,
                seed=item["seed"],
                problem=item["problem"],
                thinking=item["thinking"],
                answer=item.get("reply") or item.get("answer") or "",
                score=item["score"],
            )
        except (msgspec.DecodeError, KeyError) as error:
            raise UserError(f"the file of items {path} is damaged ({error}): run the evaluation again") from error
