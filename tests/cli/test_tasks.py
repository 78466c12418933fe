"""`openbook tasks`: the list, one problem, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openbook.checkpoint import locate as locate_module
from openbook.cli.main import main
from openbook.tasks.registry import all_tasks, get_task


@pytest.fixture
def no_releases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(locate_module, "releases_dir", lambda: tmp_path)


def test_one_problem_with_its_work_and_score(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "ab", "--seed", "7", "--difficulty", "hard", "--effort", "high"]) == 0
    out = capsys.readouterr().out
    task = get_task("ab")
    problem = task.generate(7, "hard")
    work = task.work(problem)
    assert out.startswith("ab, hard, seed 7\n")
    for text in (problem.question.strip(), work.steps, work.check, f"\nanswer\n{work.answer}\n\nscore\n1\n"):
        assert text in out


@pytest.mark.parametrize(("effort", "has_steps", "has_check"), [("low", 0, 0), ("medium", 1, 0), ("high", 1, 1)])
def test_json_of_one_problem(capsys: pytest.CaptureFixture[str], effort: str, has_steps: int, has_check: int) -> None:
    assert main(["tasks", "spell_backward", "--seed", "3", "--effort", effort, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    task = get_task("spell_backward")
    work = task.work(task.generate(3))
    assert (work.steps in shown["reasoning"], work.check in shown["reasoning"]) == (bool(has_steps), bool(has_check))
    assert shown["answer"] == work.answer
    assert shown["score"] == 1.0
    assert set(shown) == {"task", "difficulty", "seed", "effort", "question", "reasoning", "answer", "score"}


def test_the_list_counts_characters_without_nano(capsys: pytest.CaptureFixture[str], no_releases: None) -> None:
    assert main(["tasks", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["unit"] == "characters"
    assert [row["name"] for row in listed["tasks"]] == list(all_tasks())
    row = next(row for row in listed["tasks"] if row["name"] == "spell_backward")
    task = get_task("spell_backward")
    lengths = sorted(len(task.generate(seed, "hard").question) for seed in range(5))
    assert row["hard"]["prompt"] == lengths[2]
    assert (row["group"], row["summary"]) == ("strings", task.summary)


def test_the_list_counts_tokens_of_nano(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "nano").symlink_to(tiny_folder)
    monkeypatch.setattr(locate_module, "releases_dir", lambda: tmp_path)
    assert main(["tasks"]) == 0
    out = capsys.readouterr().out
    assert "tokens of the prompt and of the worked solution, medians of 5 problems" in out
    for name, task in all_tasks().items():
        assert any(line.startswith(name) and line.endswith(task.summary) for line in out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["abb"], "openbook: unknown task 'abb': did you mean 'ab'? `openbook tasks` lists all\n"),
        (
            ["--seed", "3"],
            "openbook: --seed needs a task: give its name, as in `openbook tasks ab --seed ...`\n",
        ),
        (
            ["--effort", "medium"],
            "openbook: --effort needs a task: give its name, as in `openbook tasks ab --effort ...`\n",
        ),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], line: str) -> None:
    assert main(["tasks", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err == line
    assert captured.out == ""
