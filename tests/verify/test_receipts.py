"""Receipts: an answer comes out again, and whatever was changed in receipt or model is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from openbook.cli.main import main
from openbook.core.errors import UserError
from openbook.engine.engine import EngineSettings
from openbook.engine.model import Model
from openbook.engine.receipt import Receipt, receipt_digest, weights_digest
from openbook.engine.request import Request, SamplingParams
from openbook.engine.start import LoadOptions, start_engine
from openbook.verify.receipts import verify_receipt

PROMPT = "What is 3 plus 4?"


@pytest.fixture
def answered(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The values of a receipt of the tiny model."""
    receipt = Model.load(tiny_folder).chat(PROMPT, temperature=1.0, seed=7, max_tokens=30).receipt
    assert receipt is not None
    return receipt.to_json()


def write(folder: Path, values: dict[str, Any], *, is_signed: bool = True) -> Path:
    """A receipt file; `is_signed`: with the digest of what stands in it."""
    if is_signed:
        values = {**values, "digest": receipt_digest(msgspec.convert(values, Receipt))}
    path = folder / "receipt.json"
    path.write_text(json.dumps(values))
    return path


def test_an_answer_comes_out_again(answered: dict[str, Any], tiny_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path, answered, is_signed=False)
    result = verify_receipt(path, str(tiny_folder))
    assert (result.verdict, result.difference) == ("RECOMPUTED exact", None)
    num_prompt, num_output = len(answered["prompt_ids"]), len(answered["output_ids"])
    assert result.coverage.endswith(f"{num_prompt} tokens of prompt, {num_output} of output, all as in the receipt")


@pytest.mark.parametrize("sample", [0, 2])
def test_every_sample_of_an_engine_has_one(tiny_folder: Path, tmp_path: Path, sample: int) -> None:
    started = start_engine(str(tiny_folder), LoadOptions(), EngineSettings(max_step_tokens=5))
    engine = started.engine.engine
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=20, presence_penalty=1.0, logit_bias=((70, 2.0),))
    request = Request(prompt_ids=[1, 2, 3], params=params, id="a", num_samples=3)
    engine.add(engine.prepare(request))
    ids: list[int] = []
    reason = None
    while engine.has_work:
        for event in engine.step():
            if event.index == sample:
                ids += event.token_ids
                reason = event.finish_reason
    assert reason is not None
    receipt = started.receipts.make(request, sample, ids, reason)
    assert receipt is not None
    path = write(tmp_path, receipt.to_json(), is_signed=False)
    assert verify_receipt(path, str(tiny_folder)).verdict == "RECOMPUTED exact"


def other_token(values: dict[str, Any]) -> None:
    values["output_ids"] = [*values["output_ids"][:-1], values["output_ids"][-1] ^ 1]


def other_seed(values: dict[str, Any]) -> None:
    values["sampling"] = {**values["sampling"], "seed": 8}


def one_less(values: dict[str, Any]) -> None:
    values["output_ids"] = values["output_ids"][:-1]
    values["finish_reason"] = "stop"


def other_prompt(values: dict[str, Any]) -> None:
    values["prompt_ids"] = [5, *values["prompt_ids"]]


@pytest.mark.parametrize("change", [other_token, other_seed, one_less, other_prompt])
@pytest.mark.parametrize("is_signed", [True, False])
def test_what_was_changed_is_found(
    answered: dict[str, Any],
    tiny_folder: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    is_signed: bool,
) -> None:
    change(answered)
    result = verify_receipt(write(tmp_path, answered, is_signed=is_signed), str(tiny_folder))
    assert result.verdict == "DIFFERS"
    expected = "expected " if is_signed else "the receipt was changed: its digest is not that of what stands in it"
    assert result.difference is not None and expected in result.difference


@pytest.mark.parametrize("name", ["model.safetensors", "chat_template.jinja"])
def test_another_model_is_found(answered: dict[str, Any], tiny_folder: Path, tmp_path: Path, name: str) -> None:
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    data = bytearray((other / name).read_bytes())
    data[-1] ^= 1
    (other / name).write_bytes(data)
    result = verify_receipt(write(tmp_path, answered), str(other))
    assert result.verdict == "DIFFERS"
    assert result.difference == (
        f"the model {other} here has the digest {weights_digest(other)}, expected {answered['weights']}"
    )


def test_the_profile_fast_promises_less(tiny_folder: Path, tmp_path: Path) -> None:
    receipt = Model.load(tiny_folder, profile="fast").chat(PROMPT, max_tokens=5).receipt
    assert receipt is not None
    values = receipt.to_json()
    assert values["profile"] == "fast"
    assert verify_receipt(write(tmp_path, values), str(tiny_folder)).verdict == "RECOMPUTED"
    other_token(values)
    assert verify_receipt(write(tmp_path, values), str(tiny_folder)).verdict == "UNDECIDED"


def test_an_unfinished_answer_has_none(tiny_model: Model) -> None:
    stream = tiny_model.stream(PROMPT, max_tokens=5)
    next(iter(stream), None)
    assert stream.answer.finish_reason is None and stream.answer.receipt is None


def test_wrong_files_are_one_line(answered: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"the receipt .*receipt\.json"):
        verify_receipt(path)
    with pytest.raises(UserError, match=r"is of the model tiny: .*; give the model with --model"):
        verify_receipt(write(tmp_path, answered))
    with pytest.raises(UserError, match=r"temperature is -1\.0: expected 0 or more"):
        values = {**answered, "sampling": {**answered["sampling"], "temperature": -1.0}}
        verify_receipt(write(tmp_path, values, is_signed=False))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nano", "Spell this word backward (example: sun -> nus): stone", "--json"]) == 0
    path = tmp_path / "answer.json"
    path.write_text(capsys.readouterr().out)
    assert main(["verify", str(path)]) == 0
    assert (
        capsys.readouterr().out == "RECOMPUTED exact  nano: 28 tokens of prompt, 29 of output, all as in the receipt\n"
    )
    values = json.loads(path.read_text())["receipt"]
    other_token(values)
    assert main(["verify", str(write(tmp_path, values)), "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["verdict"] == "DIFFERS"
    assert "receipt.json: token 29 of 29 is " in captured.err
    assert main(["verify", str(path), "--rebuild"]) == 2
    assert "--rebuild is for releases, and " in capsys.readouterr().err
    assert main(["verify", "nano", "--model", "nano"]) == 2
    assert "--model is for receipts, and nano is none: leave it out" in capsys.readouterr().err
