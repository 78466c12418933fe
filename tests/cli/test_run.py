"""`openbook run`: what goes where, and what is refused."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from openbook.cli.main import main
from openbook.engine.model import Model

ScriptedModel = Callable[[Callable[[str], str]], Model]


@pytest.fixture
def thinker(scripted_model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> Model:
    """`Model.load` gives a model that thinks of its prompt and answers with it, reversed."""
    model = scripted_model(lambda prompt: f"<think>asked {prompt}</think>{prompt[::-1]}")
    monkeypatch.setattr(Model, "load", lambda *args, **options: model)
    return model


def test_the_answer_goes_to_stdout_and_the_thinking_to_stderr(
    thinker: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "nano", "abc"]) == 0
    assert capsys.readouterr() == ("cba\n", "asked abc\n")
    assert main(["run", "nano", "abc", "--no-thinking"]) == 0
    assert capsys.readouterr() == ("cba\n", "")


def test_thinking_is_dimmed_on_a_terminal_only(
    thinker: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["run", "nano", "abc"]) == 0
    assert capsys.readouterr() == ("cba\n", "\x1b[2masked abc\x1b[0m\n")
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["run", "nano", "abc"]) == 0
    assert capsys.readouterr() == ("cba\n", "asked abc\n")


def test_a_dash_reads_the_prompt_from_stdin(
    thinker: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("añb".encode())))
    assert main(["run", "nano", "-"]) == 0
    assert capsys.readouterr().out == "bña\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    assert main(["run", "nano", "-"]) == 2
    expected = "openbook: standard input is not UTF-8 text (invalid start byte at byte 1): convert it\n"
    assert capsys.readouterr().err == expected


def test_json_is_one_object_with_everything(thinker: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nano", "abc", "--json", "--seed", "5", "--temperature", "0.01", "--stop", "a"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(out)
    timings = result.pop("timings")
    assert timings["total_s"] >= timings["first_token_s"] >= 0
    assert timings["load_s"] >= 0
    assert result["token_ids"][-1] not in thinker.tokenizer.stop_ids
    assert len(result.pop("token_ids")) == result["usage"]["completion_tokens"]
    assert result == {
        "model": "scripted",
        "prompt": "abc",
        "images": [],
        "effort": "medium",
        "reasoning": "asked abc",
        "answer": "cb",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 6, "completion_tokens": 14},
        "sampling": {
            "temperature": 0.01,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "stop": ["a"],
            "max_tokens": None,
            "seed": 5,
        },
        "receipt": None,
    }


def test_an_answer_that_is_cut_off_says_by_what(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tiny_folder), "Hello", "--max-tokens", "2"]) == 0
    assert capsys.readouterr().err.endswith("(cut off after 2 tokens by --max-tokens)\n")
    assert main(["run", str(tiny_folder), "Hello"]) == 0
    assert capsys.readouterr().err.endswith("tokens by the model's context of 160, prompt included)\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([""], "the prompt is empty: expected a question; give some text"),
        (
            ["x" * 300],
            "the prompt has 303 tokens and the model's context is 160 (prompt and answer): shorten the prompt",
        ),
        (["Hi", "--temperature", "-1"], "temperature is -1.0: expected 0 or more; correct that value"),
        (["Hi", "--top-p", "2"], "top_p is 2.0: expected more than 0 and at most 1; correct that value"),
        (["Hi", "--stop", ""], "stop is ['']: expected strings that are not empty; correct that value"),
        (["Hi", "--device", "gpu"], "unknown device 'gpu': did you mean 'cpu'? expected cpu, cuda or cuda:N"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    tiny_folder: Path, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(tiny_folder), *arguments]) == 2
    assert capsys.readouterr() == ("", f"openbook: {line}\n")


def test_an_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nonesuch", "Hi"]) == 2
    assert capsys.readouterr().err.startswith("openbook: unknown model 'nonesuch': ")


def test_truncated_weights_are_one_line(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    folder = tmp_path / "cut"
    shutil.copytree(tiny_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["run", str(folder), "Hi"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "model.safetensors" in err


def test_dtype(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    load = Model.load
    monkeypatch.setattr(
        Model, "load", lambda *given, **options: seen.append(options["dtype"]) or load(*given, **options)
    )
    assert main(["run", "nano", "1 + 1", "--max-tokens", "1", "--dtype", "bfloat16"]) == 0
    assert seen == ["bfloat16"]
    assert main(["run", "nano", "1 + 1", "--dtype", "float8"]) == 2
    assert "'float8' is not one of 'float32', 'bfloat16'" in capsys.readouterr().err
