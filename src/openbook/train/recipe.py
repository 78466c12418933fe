"""The recipe: one TOML file that holds everything that decides a model's weights. Flags only say where and how fast."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from openbook.core.config import Config, config_hash, convert, load_toml
from openbook.core.errors import UserError, unknown_name
from openbook.core.seeding import TRAIN_SEED_START
from openbook.data.mixture import MixtureEntry
from openbook.data.pack import DataConfig
from openbook.models.config import ModelConfig
from openbook.models.registry import require_family
from openbook.tasks.base import Difficulty, Effort
from openbook.tasks.registry import get_task
from openbook.tokenizer.train import TokenizerConfig
from openbook.train.optim import OptimizerConfig
from openbook.train.schedule import ScheduleConfig

# Names of folders in a build; a stage of that name would collide with one.
_STEP_NAMES = ("tokenizer", "data", "evals", "release")


class StageConfig(Config, frozen=True, kw_only=True):
    """One stage of training: its own data, its own learning rate schedule.

    documents: training texts to make. steps: optimizer updates; the documents are read again, in a new order, when they
    run out. global_batch_tokens: tokens of one step, padding included. micro_batch_size: rows of one forward and
    backward; 0 means the whole step at once. checkpoint_steps: steps between saved states.
    """

    name: str
    documents: int
    steps: int
    global_batch_tokens: int
    schedule: ScheduleConfig
    mixture: list[MixtureEntry]
    micro_batch_size: int = 0
    checkpoint_steps: int = 500

    def __post_init__(self) -> None:
        for name in ("documents", "steps", "global_batch_tokens", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.micro_batch_size < 0:
            raise ValueError(f"micro_batch_size is {self.micro_batch_size}, expected 0 or more")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", self.name):
            raise ValueError(f"name is {self.name!r}, expected up to 64 letters, digits and underscores")
        if not self.mixture:
            raise ValueError("mixture is empty, expected at least one entry")


class EvalConfig(Config, frozen=True, kw_only=True):
    """The scores that a release carries: `samples` fresh problems of each task, from `seed` on.

    difficulties, efforts: every combination is scored.
    """

    tasks: list[str]
    samples: int = 100
    seed: int = 500_000_000
    difficulties: list[Difficulty] = msgspec.field(default_factory=lambda: ["easy"])
    efforts: list[Effort] = msgspec.field(default_factory=lambda: ["medium"])
    max_tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("tasks", "difficulties", "efforts"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty, expected at least one")
        for name in ("samples", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        most = TRAIN_SEED_START - self.samples
        if not 0 <= self.seed <= most:
            raise ValueError(f"seed is {self.seed}, expected 0 to {most}: what is above belongs to training")


class Recipe(Config, frozen=True, kw_only=True):
    """Everything that decides the weights of one model.

    profile: "exact" (on a CPU, the same bits whatever the machine, threads and workers) or "fast". precision: of
    weights and activations in a step; exact means float32.
    """

    name: str
    description: str
    license: Literal["Apache-2.0"]
    seed: int
    precision: Literal["float32", "bfloat16"]
    profile: Literal["exact", "fast"] = "fast"
    tokenizer: TokenizerConfig
    model: dict[str, Any]
    data: DataConfig
    optimizer: OptimizerConfig
    stages: list[StageConfig]
    eval: EvalConfig

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name):
            raise ValueError(f"name is {self.name!r}, expected a file name: letters, digits, dots, dashes, at most 64")
        names = [stage.name for stage in self.stages]
        if not names:
            raise ValueError("stages is empty, expected at least one [[stages]]")
        if len(set(names)) != len(names) or set(names) & set(_STEP_NAMES):
            raise ValueError(f"stages are named {names}, expected different names, none of them {_STEP_NAMES}")
        if self.profile == "exact" and self.precision != "float32":
            raise ValueError(
                f'profile is "exact" and precision {self.precision!r}, expected precision "float32": change one of them'
            )
        if "vocab_size" in self.model:
            raise ValueError("model.vocab_size is given, expected none: it follows from the tokenizer")

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model's shape for a tokenizer of `vocab_size` tokens.

        Raises:
            UserError: an unknown or missing key under [model], or a shape that does not fit together.
        """
        where = "the recipe's [model]"
        family = require_family(str(self.model.get("model_type", "qwen3")), where)
        return convert({**self.model, "vocab_size": vocab_size}, family.config, where)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks it trains on, in the order of first mention."""
        return list(dict.fromkeys(entry.task for stage in self.stages for entry in stage.mixture))

    @property
    def hash(self) -> str:
        """What identifies the model: SHA-256 of the canonical form, 64 hex digits."""
        return config_hash(self)


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        UserError: the file is missing, a key is unknown or missing, a value has the wrong type or does not fit.
    """
    recipe = load_toml(path, Recipe, "recipe")
    config = recipe.model_config(recipe.tokenizer.vocab_size)
    require_family(config.model_type, f"the recipe {path}")
    for name in (*recipe.tasks, *recipe.eval.tasks):
        get_task(name)
    if recipe.data.row_tokens > config.max_position_embeddings:
        raise UserError(
            f"the recipe {path}: data.row_tokens is {recipe.data.row_tokens}, expected at most "
            f"model.max_position_embeddings = {config.max_position_embeddings}; lower the one or raise the other"
        )
    for stage in recipe.stages:
        rows, rest = divmod(stage.global_batch_tokens, recipe.data.row_tokens)
        if rest or (stage.micro_batch_size and rows % stage.micro_batch_size):
            raise UserError(
                f"the recipe {path}: stage {stage.name} has global_batch_tokens {stage.global_batch_tokens} and "
                f"micro_batch_size {stage.micro_batch_size}, expected a whole number of micro-steps of rows of "
                f"{recipe.data.row_tokens} tokens; change one of them"
            )
    return recipe


def require_problems(recipe: Recipe) -> None:
    """Make one problem of each mixture entry, before anything is written: parameters are the generators' to judge.

    Raises:
        UserError: a generator does not know a parameter or refuses its value.
    """
    for stage in recipe.stages:
        for entry in stage.mixture:
            get_task(entry.task).generate(TRAIN_SEED_START, entry.difficulty, **entry.params)


def find_recipe(name: str) -> Path:
    """The path that was given; when it does not exist, an error with the nearest recipe file beside it."""
    path = Path(name)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path("recipes")
        known = [str(file) for file in sorted(folder.glob("*.toml"))]
        raise unknown_name("recipe file", name, known, "give the path of a .toml file such as recipes/nano.toml")
    return path


def dump(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, defaults filled in."""
    values: dict[str, Any] = msgspec.to_builtins(recipe)
    return values
