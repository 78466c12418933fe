"""The facts of a release: what the card and the report say, each read from a file of the build."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
    """Where and with what the weights were made; an empty value means that the build did not record it."""

    precision: str
    optimizer: str
    device: str
    machine: str
    threads: int
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
