"""`openbook demo`: verified, five fresh problems scored, and nothing of it made up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from openbook.cli import demo
from openbook.cli.demo import NUM_PROBLEMS, draw_problems
from openbook.cli.main import main
from openbook.core.errors import UserError
from openbook.tasks.registry import get_task


def test_problems_are_a_function_of_the_seed() -> None:
    tasks = ["gcd", "spell_backward", "ab"]
    problems = draw_problems(tasks, 5)
    assert [p.question for p in problems] == [p.question for p in draw_problems(tasks, 5)]
    assert [p.question for p in problems] != [p.question for p in draw_problems(tasks, 6)]
    assert len(problems) == NUM_PROBLEMS
    assert {p.task for p in problems} == set(tasks)
    assert all(0 <= p.seed < 1_000_000_000 for p in problems)


def test_a_model_without_tasks_is_refused() -> None:
    with pytest.raises(UserError, match="names no tasks it was trained on"):
        draw_problems([], 5)


def test_demo_shows_and_scores(made_release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(made_release), "--seed", "5"]) == 0
    out = capsys.readouterr().out
    assert "INTEGRITY, 16 files" in out
    assert "(repeat these with --seed 5)" in out
    assert all(out.count(f"   {head} | ") == NUM_PROBLEMS for head in ("asks   ", "scores "))
    assert out.count("   answers | ") >= NUM_PROBLEMS
    assert "gcd                        easy, medium   50.0%  (9.5 to 90.5, 2 problems)" in out
    assert out.rstrip().splitlines()[-4] == "Now try:"
    assert all(line.startswith("   openbook ") for line in out.rstrip().splitlines()[-3:])


def test_demo_json_scores_what_was_said(made_release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(made_release), "--seed", "5", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["verification"]["verdict"] == "INTEGRITY"
    assert values["seed"] == 5
    assert [item["question"] for item in values["problems"]] == [
        p.question for p in draw_problems(["spell_backward", "gcd"], 5)
    ]
    for item in values["problems"]:
        problem = get_task(item["task"]).generate(item["seed"])
        assert item["score"] == get_task(item["task"]).score(problem, item["answer"].strip())


def test_seeds_are_fresh_each_run(
    made_release: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "NUM_PROBLEMS", 1)
    seeds = []
    for _ in range(2):
        assert main(["demo", str(made_release), "--json"]) == 0
        seeds.append(json.loads(capsys.readouterr().out)["seed"])
    assert seeds[0] != seeds[1]
    assert all(0 <= seed < 1_000_000_000 for seed in seeds)


def test_a_changed_release_is_not_demonstrated(
    made_release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = Path(shutil.copytree(made_release, tmp_path / "release"))
    (release / "README.md").write_text("x")
    assert main(["demo", str(release)]) == 1
    assert "is not the model that was released: see `openbook verify" in capsys.readouterr().err
