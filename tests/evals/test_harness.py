"""The harness: which problems are put, how replies are read and scored, and what the report says."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd, lcm
from pathlib import Path
from typing import Any

import msgspec
import pytest

from openbook.core.errors import UserError
from openbook.engine.model import Model
from openbook.evals.harness import evaluate, score
from openbook.evals.prompts import conversation, extract_answer
from openbook.evals.report import write_report
from openbook.tasks.registry import get_task

ScriptedModel = Callable[[Callable[[str], str]], Model]


def numbers_in(text: str) -> list[int]:
    """All whole numbers of a text."""
    return [int(word) for word in "".join(c if c.isdigit() else " " for c in text).split()]


def solve(prompt: str) -> str:
    """Right on gcd, wrong on every lcm whose smallest number is odd."""
    numbers = numbers_in(prompt)
    if "Least Common Multiple" in prompt:
        return f"<think>lcm</think>{lcm(*numbers) if min(numbers) % 2 == 0 else 'no idea'}"
    return f"<think>gcd of {numbers}</think>{gcd(*numbers)}"


def test_items_are_the_problems_of_the_seeds_and_scores_are_the_scorers(scripted_model: ScriptedModel) -> None:
    report = evaluate(scripted_model(solve), ["lcm", "gcd"], seed=500, samples=20, batch_size=7)
    assert [(item.task, item.seed) for item in report.items] == [
        (task, 500 + index) for task in ("lcm", "gcd") for index in range(20)
    ]
    for item in report.items:
        problem = get_task(item.task).generate(item.seed, "easy")
        assert item.problem == problem.question
        assert item.answer is not None
        assert item.score == get_task(item.task).score(problem, item.answer)
    by_task = report.by_task
    num_even = sum(min(numbers_in(item.problem)) % 2 == 0 for item in report.items_of("lcm"))
    assert 0 < num_even < 20
    assert (by_task["gcd"].accuracy, by_task["lcm"].accuracy) == (1.0, num_even / 20)
    assert report.accuracy == (20 + num_even) / 40
    assert report.interval.low < report.accuracy < report.interval.high
    assert report.items_of("gcd")[0].thinking.startswith("gcd of [")


def test_partial_marks_count_in_the_mean_score_only(scripted_model: ScriptedModel) -> None:
    report = evaluate(scripted_model(lambda _: "nonsense"), ["letter_counting", "gcd"], seed=1, samples=4)
    scores = [item.score for item in report.items]
    assert report.accuracy == 0.0
    assert report.totals.mean_score == pytest.approx(sum(scores) / len(scores))


def test_an_empty_reply_and_one_that_breaks_the_scorer_score_zero(scripted_model: ScriptedModel) -> None:
    report = evaluate(scripted_model(lambda _: "<think>well</think>"), ["gcd"], seed=3, samples=2)
    assert [(item.answer, item.score) for item in report.items] == [(None, 0.0)] * 2
    problem = get_task("gcd").generate(1)
    assert score(problem, "\x00 [[[ \n 1/0") < 1.0


def test_a_problem_past_the_context_scores_zero_and_says_why(tiny_model: Model) -> None:
    report = evaluate(tiny_model, ["gcd", "base_conversion"], seed=1, samples=2)
    refused = report.items_of("base_conversion")
    assert all(item.error and item.error.endswith("tokens and the model's context is 160") for item in refused)
    assert all((item.score, item.tokens, item.finish_reason) == (0.0, 0, None) for item in refused)
    assert all(item.error is None and item.tokens > 0 for item in report.items_of("gcd"))


def test_results_do_not_depend_on_the_batch_size(tiny_model: Model) -> None:
    def items(batch_size: int) -> list[Any]:
        report = evaluate(tiny_model, ["gcd"], seed=9, samples=5, temperature=1.0, max_tokens=12, batch_size=batch_size)
        return report.items

    assert items(1) == items(4)


def test_other_models_are_asked_for_answer_tags(scripted_model: ScriptedModel, tmp_path: Path) -> None:
    given: list[str] = []

    def reply(prompt: str) -> str:
        given.append(prompt)
        return f"<think>x</think>So it is <answer>\n{gcd(*numbers_in(prompt))}\n</answer>."

    model = scripted_model(reply)
    model.folder = tmp_path  # no recipe there: not one of ours
    report = evaluate(model, ["gcd"], seed=4, samples=3)
    assert report.settings.prompt_style == "answer-tags"
    assert report.accuracy == 1.0
    assert given[0].startswith("Given a problem, your task is to answer the question by thinking step-by-step")
    assert evaluate(model, ["gcd"], seed=4, samples=3, prompt_style="bare").accuracy == 0.0


@pytest.mark.parametrize(
    ("text", "style", "answer"),
    [
        (" 42\n", "bare", "42"),
        ("", "bare", None),
        ("<answer>1</answer> no, <answer> 2 </answer>", "answer-tags", "2"),
        ("42", "answer-tags", None),
        ("<answer> </answer>", "answer-tags", None),
    ],
)
def test_the_answer_in_a_reply(text: str, style: Any, answer: str | None) -> None:
    assert extract_answer(text, style) == answer


def test_a_bare_prompt_is_the_question_alone() -> None:
    assert conversation("What?", "bare") == [{"role": "user", "content": "What?"}]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"samples": 0}, "samples is 0: expected 1 or more; correct that value"),
        ({"tasks": []}, "there is no task to evaluate: give a suite with at least one task"),
        (
            {"seed": 999_999_999, "samples": 2},
            "seeds 999,999,999 to 1,000,000,000 are not for evaluation: from 1,000,000,000 on they belong to training; "
            "choose a smaller --seed",
        ),
        ({"tasks": ["gdc"]}, "unknown task 'gdc': did you mean 'gcd'? `openbook tasks` lists all"),
    ],
)
def test_bad_settings_are_one_line(tiny_model: Model, values: dict[str, Any], line: str) -> None:
    settings = {"tasks": ["gcd"], "seed": 1, "samples": 1, **values}
    with pytest.raises(UserError) as error:
        evaluate(tiny_model, settings.pop("tasks"), **settings)
    assert str(error.value) == line


def test_the_files_hold_every_item_and_the_summary(scripted_model: ScriptedModel, tmp_path: Path) -> None:
    report = evaluate(scripted_model(solve), ["lcm", "gcd"], seed=70, samples=6)
    out = tmp_path / "evals" / "x"
    write_report(report, out)
    assert sorted(file.name for file in out.iterdir()) == ["gcd.jsonl", "lcm.jsonl", "summary.json"]
    lines = [msgspec.json.decode(line) for line in (out / "lcm.jsonl").read_bytes().splitlines()]
    assert lines == [msgspec.to_builtins(item) for item in report.items_of("lcm")]
    summary = msgspec.json.decode((out / "summary.json").read_bytes())
    assert summary["totals"]["items"] == 12
    assert summary["tasks"]["gcd"]["accuracy"] == 1.0
    assert summary["settings"]["seed"] == 70
    with pytest.raises(UserError, match=r"--out .* exists already and nothing is overwritten"):
        write_report(report, out)
