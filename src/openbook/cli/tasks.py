"""`openbook tasks`: what a model can be trained on and measured with."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import click
from click.core import ParameterSource

from openbook.cli.options import effort_option, json_option, print_json, seed_option
from openbook.core.errors import UserError

NUM_SAMPLES = 5  # problems behind each median in the list


@click.command("tasks")
@click.argument("task", required=False)
@seed_option(0, "Seed of the problem: the same seed, the same problem.")
@click.option(
    "--difficulty",
    type=click.Choice(("easy", "hard")),
    default="easy",
    show_default=True,
    help="reasoning-gym's default configuration, or the published hard one.",
)
@effort_option()
@json_option
@click.pass_context
def command(ctx: click.Context, task: str | None, seed: int, difficulty: str, effort: str, as_json: bool) -> None:
    """List the tasks, or show a problem with its worked solution and its score.

    TASK is a name from the list. The list shows how long prompts and worked solutions are: medians of 5 problems, in
    tokens of the bundled model nano, or in characters where it is missing.
    """
    if task is not None:
        shown = _example(task, seed, difficulty, effort)
        if as_json:
            print_json(shown)
        else:
            _print_example(shown)
        return
    for option in ("seed", "difficulty", "effort"):
        if ctx.get_parameter_source(option) is not ParameterSource.DEFAULT:
            raise UserError(f"--{option} needs a task: give its name, as in `openbook tasks ab --{option} ...`")
    unit, length = _measure()
    rows = _rows(length)
    if as_json:
        print_json({"unit": unit, "samples": NUM_SAMPLES, "tasks": rows})
    else:
        _print_list(rows, unit)


def _example(name: str, seed: int, difficulty: Any, effort: Any) -> dict[str, Any]:
    from openbook.tasks.registry import get_task

    task = get_task(name)
    problem = task.generate(seed, difficulty)
    work = task.work(problem)
    return {
        "task": task.name,
        "difficulty": difficulty,
        "seed": seed,
        "effort": effort,
        "question": problem.question,
        "reasoning": work.reasoning(effort),
        "answer": work.answer,
        "score": task.score(problem, work.answer),
    }


def _print_example(shown: dict[str, Any]) -> None:
    click.secho(f"{shown['task']}, {shown['difficulty']}, seed {shown['seed']}", bold=True)
    click.echo(shown["question"].rstrip())
    if shown["reasoning"]:
        click.secho(f"\nworked solution, effort {shown['effort']}", bold=True)
        click.secho(shown["reasoning"], dim=True)
    click.secho("\nanswer", bold=True)
    click.echo(shown["answer"])
    click.secho("\nscore", bold=True)
    click.echo(f"{shown['score']:g}")


def _measure() -> tuple[str, Callable[[str], int]]:
    """The unit of lengths and how to measure: tokens of nano if it is bundled, else characters."""
    from openbook.checkpoint.locate import bundled_names, locate

    if "nano" not in bundled_names():
        return "characters", len
    from openbook.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(locate("nano"))
    return "tokens", lambda text: len(tokenizer.encode(text))


def _rows(length: Callable[[str], int]) -> list[dict[str, Any]]:
    from openbook.tasks.base import DIFFICULTIES
    from openbook.tasks.registry import all_tasks

    rows: list[dict[str, Any]] = []
    for task in all_tasks().values():
        row: dict[str, Any] = {"name": task.name, "group": task.group, "summary": task.summary}
        for difficulty in DIFFICULTIES:
            problems = [task.generate(seed, difficulty) for seed in range(NUM_SAMPLES)]
            row[difficulty] = {
                "prompt": median(length(problem.question) for problem in problems),
                "solution": median(length(task.work(problem).reasoning("medium")) for problem in problems),
            }
        rows.append(row)
    return rows


def _print_list(rows: list[dict[str, Any]], unit: str) -> None:
    name_width = max(len(row["name"]) for row in rows)
    group_width = max(len(row["group"]) for row in rows)
    click.secho(f"{'task':<{name_width}}  {'group':<{group_width}}  {'easy':>11}  {'hard':>11}  summary", bold=True)
    for row in rows:
        easy, hard = (f"{row[level]['prompt']:>5} {row[level]['solution']:>5}" for level in ("easy", "hard"))
        click.echo(f"{row['name']:<{name_width}}  {row['group']:<{group_width}}  {easy}  {hard}  {row['summary']}")
    click.echo(f"\neasy, hard: {unit} of the prompt and of the worked solution, medians of {NUM_SAMPLES} problems")
