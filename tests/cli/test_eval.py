"""`openbook eval`: table, JSON, files and thresholds."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import gcd
from pathlib import Path

import pytest

from openbook.cli.main import main
from openbook.engine.model import Model

ScriptedModel = Callable[[Callable[[str], str]], Model]


def solve_even(prompt: str) -> str:
    """Right where the smallest number is even."""
    numbers = [int(word) for word in "".join(c if c.isdigit() else " " for c in prompt).split()]
    return str(gcd(*numbers)) if min(numbers) % 2 == 0 else "?"


@pytest.fixture
def solver(scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Model:
    """`Model.load` gives a model that solves some gcd; the test runs in an empty folder."""
    model = scripted_model(solve_even)
    monkeypatch.setattr(Model, "load", lambda *args, **options: model)
    monkeypatch.chdir(tmp_path)
    return model


def test_the_table_has_accuracy_and_interval(
    solver: Model, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tiny_folder), "gcd,lcm", "--seed", "7", "--samples", "10"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    file = Path("evals/tiny-gcd+lcm-easy-medium-7-10/gcd.jsonl")
    items = [json.loads(line) for line in file.read_text().splitlines()]
    share = sum(item["score"] == 1.0 for item in items) / 10
    assert 0 < share < 1
    assert lines[0].startswith("scripted: easy, effort medium, seed 7, 10 problems a task, in 0:0")
    assert lines[1] == "task  accuracy  95% interval     mean score  tokens"
    assert lines[2].split()[:2] == ["gcd", f"{share:.1%}"]
    assert [line.split()[0] for line in lines[2:5]] == ["gcd", "lcm", "all"]
    assert lines[5] == "every item: evals/tiny-gcd+lcm-easy-medium-7-10"
    assert err.startswith("eval         done in ")


def test_json_is_the_summary(solver: Model, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tiny_folder), "gcd", "--samples", "8", "--json", "--out", "here", "--effort", "low"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("out") == "here"
    assert printed == json.loads(Path("here/summary.json").read_text())
    assert printed["settings"]["effort"] == "low"
    assert printed["totals"]["items"] == 8


def test_an_accuracy_below_the_threshold_is_exit_1(
    solver: Model, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(tiny_folder), "gcd", "--samples", "10", "--seed", "7"]
    assert main([*arguments, "--out", "a", "--threshold", "0.1"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--out", "b", "--threshold", "0.99"]) == 1
    assert capsys.readouterr().err.endswith("% is below the threshold of 99.0%\n")
    assert Path("b/summary.json").exists()


def test_a_random_model_runs_from_its_folder(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores"
    settings = ["--samples", "3", "--difficulty", "hard", "--max-tokens", "9", "--json"]
    assert main(["eval", str(tiny_folder), "gcd", "--out", str(out), *settings]) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["gcdd"], "unknown suite 'gcdd': did you mean 'gcd'?"),
        (["gcd", "--out", "."], "--out . exists already and nothing is overwritten: give a new path"),
        (["gcd", "--temperature", "-1"], "temperature is -1.0: expected 0 or more; correct that value"),
        (["gcd", "--seed", "1000000000"], "invalid value for '--seed': 1000000000 is not in the range 0<=x<=999999999"),
        (["gcd", "--seed", "999999999"], "seeds 999,999,999 to 1,000,000,048 are not for evaluation"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments: list[str],
    line: str,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(tiny_folder), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"openbook: {line}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_ctrl_c_writes_nothing_and_says_so(
    solver: Model, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "generate_batch", interrupt)
    assert main(["eval", str(tiny_folder), "gcd", "--samples", "3"]) == 130
    assert capsys.readouterr().err == "openbook: stopped; nothing was written: run the same command again\n"
    assert not list(Path().iterdir())
