"""The public functions of the package; `openbook` exports them lazily."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openbook.engine.choices import CacheKind, Dtype, Profile
    from openbook.engine.model import Model
    from openbook.evals.report import Report
    from openbook.tasks.base import Difficulty, Effort


def load(
    model: str | Path,
    *,
    profile: Profile | None = None,
    device: str = "cpu",
    dtype: Dtype | None = None,
    cache: CacheKind | None = None,
) -> Model:
    """Load a bundled model by name ("nano"), or a release or Hugging Face folder by path.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        profile: "exact" or "fast"; None is exact for dense models on a CPU with no dtype asked for.
        dtype: "float32" or "bfloat16", of weights and activations in the profile fast.
        cache: "float32" or "int8", of keys and values, for dense models in the profile exact.

    Raises:
        UserError: there is no such model or device, or a file of the model is missing or damaged.
    """
    from openbook.engine.model import Model

    return Model.load(model, profile=profile, device=device, dtype=dtype, cache=cache)


def evaluate(
    model: Model | str | Path,
    suite: str | Sequence[str],
    *,
    seed: int = 45,
    samples: int = 50,
    config: Difficulty = "easy",
    effort: Effort = "medium",
    temperature: float = 0.0,
    batch_size: int = 64,
) -> Report:
    """Score a model on fresh problems; item i of a task is its problem of seed + i.

    Args:
        model: a loaded model, or what `load` takes.
        suite: names of tasks, groups of tasks or bundled models ("gcd", "gcd,lcm", "strings", "nano", "all").
        samples: problems a task.
        config: "easy" or "hard", the configurations of the published scores.

    Returns:
        a report with `accuracy`, `interval` (95%, Wilson), `by_task` and `items`.

    Raises:
        UserError: an unknown model or task, or seeds that belong to training.
    """
    from openbook.engine.model import Model
    from openbook.evals import harness
    from openbook.evals.suites import task_names

    return harness.evaluate(
        model if isinstance(model, Model) else Model.load(model),
        task_names(suite if isinstance(suite, str) else ",".join(suite)),
        seed=seed,
        samples=samples,
        difficulty=config,
        effort=effort,
        temperature=temperature,
        batch_size=batch_size,
    )
