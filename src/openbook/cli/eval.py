"""`openbook eval`: scores that can be recomputed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from openbook.cli.options import effort_option, json_option, model_argument, print_json, seed_option
from openbook.core.errors import CheckError, UserError
from openbook.core.files import require_absent
from openbook.core.progress import Progress, format_duration

if TYPE_CHECKING:
    from openbook.evals.prompts import PromptStyle
    from openbook.evals.report import Report, Totals
    from openbook.tasks.base import Difficulty, Effort


@click.command("eval", short_help="Score a model on tasks and write every item beside the summary.")
@model_argument()
@click.argument("suite")
@seed_option(45, "Seed of the first problem; the next ones follow.", evaluation=True)
@click.option("--samples", type=click.IntRange(min=1), default=50, show_default=True, help="Problems a task.")
@click.option(
    "--difficulty",
    type=click.Choice(["easy", "hard"]),
    default="easy",
    show_default=True,
    help="reasoning-gym's default configuration, or the published hard one.",
)
@effort_option()
@click.option(
    "--prompt-style",
    type=click.Choice(["auto", "bare", "answer-tags"]),
    default="auto",
    show_default=True,
    help="bare: the question alone. answer-tags: behind reasoning-gym's system prompt, answer between tags. "
    "auto: bare for our releases, answer-tags for other models.",
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--max-tokens", type=int, help="Most tokens a reply, thinking included.  [default: up to the context]")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Problems decoded at a time; changes speed only.",
)
@click.option("--threshold", type=click.FloatRange(0, 1), metavar="SHARE", help="Exit with 1 if the accuracy is below.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A new folder for summary.json and <task>.jsonl.  [default: evals/MODEL-SUITE-...]",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@json_option
def command(
    model: str,
    suite: str,
    seed: int,
    samples: int,
    difficulty: Difficulty,
    effort: Effort,
    prompt_style: str,
    temperature: float,
    max_tokens: int | None,
    batch_size: int,
    threshold: float | None,
    out: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Score MODEL on the tasks of SUITE and write every item beside the summary.

    SUITE is a task, a group of tasks (arithmetic), a bundled model (the tasks that it was trained on), all, or several
    of these joined by commas. Accuracy is the share of problems with the full score of 1.0.
    """
    from openbook.checkpoint.locate import locate
    from openbook.engine.request import SamplingParams
    from openbook.evals.suites import task_names

    if threshold is not None and math.isnan(threshold):
        raise UserError("--threshold is nan: expected a share from 0 to 1; correct that value")
    folder = locate(model)
    tasks = task_names(suite)
    SamplingParams(temperature=temperature, max_tokens=max_tokens)  # refuse bad values before the model is loaded
    out = out or Path("evals") / _folder_name(folder.resolve().name, suite, difficulty, effort, seed, samples)
    require_absent(out)

    from openbook.engine.model import Model
    from openbook.evals.harness import evaluate
    from openbook.evals.report import write_report

    style: dict[str, PromptStyle | None] = {"auto": None, "bare": "bare", "answer-tags": "answer-tags"}
    try:
        with Progress("eval", len(tasks) * samples) as progress:
            report = evaluate(
                Model.load(model, device=device),
                tasks,
                seed=seed,
                samples=samples,
                difficulty=difficulty,
                effort=effort,
                prompt_style=style[prompt_style],
                temperature=temperature,
                max_tokens=max_tokens,
                batch_size=batch_size,
                on_item=lambda done, correct: progress.update(done, f"{correct / done:.1%} correct"),
            )
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("stopped; nothing was written: run the same command again") from error
    write_report(report, out)
    if as_json:
        print_json({**report.summary(), "out": str(out)})
    else:
        click.echo(table(report))
        click.echo(f"every item: {out}")
    if threshold is not None and report.accuracy < threshold:
        raise CheckError(f"accuracy {report.accuracy:.1%} is below the threshold of {threshold:.1%}")


def table(report: Report) -> str:
    """Accuracy, its interval and mean score of each task, and of all of them if there are several."""
    rows = list(report.by_task.items())
    if len(rows) > 1:
        rows.append(("all", report.totals))
    width = max(4, *(len(name) for name, _ in rows))
    settings = report.settings
    lines = [
        f"{settings.model}: {settings.difficulty}, effort {settings.effort}, seed {settings.seed}, "
        f"{settings.samples} problems a task, in {format_duration(report.seconds)}",
        f"{'task':<{width}}  accuracy  95% interval     mean score  tokens",
    ]
    return "\n".join([*lines, *(_row(name, totals, width) for name, totals in rows)])


def _row(name: str, totals: Totals, width: int) -> str:
    interval = f"{totals.interval.low:.1%} to {totals.interval.high:.1%}"
    figures = f"{totals.accuracy:>8.1%}  {interval:<15}  {totals.mean_score:>10.3f}  {totals.mean_tokens:>6.0f}"
    return f"{name:<{width}}  {figures}"


def _folder_name(model: str, suite: str, *settings: Any) -> str:
    return "-".join([model, suite.replace(" ", "").replace(",", "+"), *map(str, settings)])
