"""`openbook demo`: what a bundled model is, in a minute: checked, thinking, scored."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import click

from openbook.cli.options import json_option, model_argument, print_json, seed_option
from openbook.core.errors import CheckError, UserError
from openbook.core.seeding import TRAIN_SEED_START

if TYPE_CHECKING:
    from openbook.engine.model import AnswerStream, Model
    from openbook.release.facts import Score
    from openbook.tasks.base import Problem

NUM_PROBLEMS = 5


@click.command("demo")
@model_argument("nano")
@seed_option(None, "Seed of the problems; a fresh one each run, and printed, unless given.", evaluation=True)
@json_option
def command(model: str, seed: int | None, as_json: bool) -> None:
    """Check the bundled model, watch it solve five fresh problems, see its scores.

    MODEL is a bundled name (default: nano) or a release folder. The problems are new ones from the generators of its
    own tasks, made from seeds that training may not use; each answer is scored by the task's own scorer.
    """
    from openbook.checkpoint.locate import locate
    from openbook.engine.model import Model
    from openbook.release.facts import read_scores
    from openbook.verify.verification import verify

    folder = locate(model)
    result = verify(folder)
    if result.differences:
        raise CheckError(f"{model} is not the model that was released: see `openbook verify {model}`")
    _say(as_json, f"1. Check. {model}: INTEGRITY, {result.num_files} files as in the manifest", bold=True)
    _say(as_json, f"   {result.num_parameters:,} parameters, recipe {result.recipe_sha256[:12]}\n")

    loaded = Model.load(folder)
    if seed is None:
        seed = time.time_ns() % TRAIN_SEED_START
    problems = draw_problems(loaded.tasks, seed)
    _say(as_json, f"2. Solve. {NUM_PROBLEMS} fresh problems (repeat these with --seed {seed})\n", bold=True)
    solved = [_solve(loaded, problem, as_json) for problem in problems]

    scores = read_scores(folder / "provenance" / "evals")
    _say(as_json, "3. Scores in its release, with 95% intervals", bold=True)
    for score in scores:
        _say(as_json, f"   {_score_line(score)}")
    if as_json:
        print_json({"verification": result, "seed": seed, "problems": solved, "scores": scores})
        return
    click.secho("\nNow try:", bold=True)
    click.echo(f"   openbook chat {model}\n   openbook tasks {problems[0].task}")
    click.echo(f"   openbook eval {model} {problems[0].task} --seed {seed} --samples 50")


def draw_problems(tasks: list[str], seed: int) -> list[Problem]:
    """`NUM_PROBLEMS` easy problems, of different tasks as far as there are enough, a function of `seed`.

    Raises:
        UserError: there is no task: the model is not one of ours.
    """
    from openbook.tasks.registry import get_task

    if not tasks:
        raise UserError("this model names no tasks it was trained on: give a bundled name or an Openbook release")
    draw = random.Random(seed)
    shuffled = draw.sample(tasks, len(tasks))
    names = [shuffled[index % len(shuffled)] for index in range(NUM_PROBLEMS)]
    return [get_task(name).generate(draw.randrange(TRAIN_SEED_START)) for name in names]


def _solve(model: Model, problem: Problem, as_json: bool) -> dict[str, object]:
    """Put one problem to the model, show what it says as it says it, and score the answer."""
    from openbook.evals.harness import score
    from openbook.evals.prompts import extract_answer

    _say(as_json, f"   {problem.task}, seed {problem.seed}", bold=True)
    _say(as_json, _entry("asks", problem.question.strip()))
    stream = model.stream(problem.question)
    if as_json:
        for _ in stream:
            pass
    else:
        _show(stream)
    answer = stream.answer
    points = score(problem, extract_answer(answer.text, "bare"))
    if not as_json:
        click.echo(_entry("scores", ""), nl=False)
        click.secho(f"{points:g}", fg="green" if points >= 1 else "red", nl=False)
        click.echo("\n" if points >= 1 else f" (the worked solution says {_solution(problem)})\n")
    return {
        "task": problem.task,
        "seed": problem.seed,
        "question": problem.question,
        "reasoning": answer.reasoning,
        "answer": answer.text,
        "score": points,
    }


def _show(stream: AnswerStream) -> None:
    """Print thinking and answer under a head each, as they come; line breaks keep to the column."""
    kind, has_answer = "", False
    for piece in stream:
        has_answer = has_answer or piece.kind == "answer"
        if piece.kind != kind:
            click.echo("\n" if kind else "", nl=False)
            click.echo(_entry("thinks" if piece.kind == "reasoning" else "answers", ""), nl=False)
            kind = piece.kind
        text = piece.text.replace("\n", f"\n{_entry('', '')}")
        click.secho(text, nl=False, dim=kind == "reasoning", bold=kind == "answer")
    click.echo("" if has_answer else f"\n{_entry('answers', '(nothing)')}")


def _solution(problem: Problem) -> str:
    from openbook.tasks.registry import get_task

    return get_task(problem.task).work(problem).answer


def _score_line(score: Score) -> str:
    kind = f"{score.difficulty}, {score.effort}"
    return (
        f"{score.task:<26} {kind:<13} {100 * score.accuracy:5.1f}%  ({100 * score.low:.1f} to {100 * score.high:.1f}, "
        f"{score.samples} problems)"
    )


def _entry(head: str, text: str) -> str:
    """Text in a column, with a head beside its first line."""
    heads = [head, *[""] * text.count("\n")]
    return "\n".join(f"   {head:<7} | {line}" for head, line in zip(heads, text.split("\n"), strict=True))


def _say(as_json: bool, text: str, *, bold: bool = False) -> None:
    if not as_json:
        click.secho(text, bold=bold)
