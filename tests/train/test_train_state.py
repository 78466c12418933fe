"""Saved states of training: whole, checked, and the newest two."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
import torch

from openbook.checkpoint.train_state import (
    TrainPosition,
    latest_train_state,
    load_train_state,
    read_position,
    save_train_state,
)
from openbook.core.errors import UserError

POSITION = TrainPosition(
    stage="main", step=5, stage_step=5, cursor={"epoch": 1, "row": 2, "document": 3}, best_loss=1.25, mean_loss=1.5
)


def _save(folder: Path, step: int = 5) -> Path:
    weights = {"a.weight": torch.full((2, 3), float(step)), "norm": torch.linspace(0.0, 1.0, 7)}
    optimizer = {"a.weight.momentum": torch.ones(2, 3), "num_updates": torch.tensor(step)}
    return save_train_state(folder, weights, optimizer, msgspec.structs.replace(POSITION, step=step))


def test_what_was_saved_comes_back_with_the_random_state(tmp_path: Path) -> None:
    torch.manual_seed(3)
    torch.rand(10)
    path = _save(tmp_path)
    expected = torch.rand(5)
    torch.manual_seed(99)
    weights, optimizer, position = load_train_state(path)
    torch.testing.assert_close(torch.rand(5), expected, rtol=0, atol=0)
    assert path.name == "step-00000005"
    assert weights.keys() == {"a.weight", "norm"}
    torch.testing.assert_close(weights["a.weight"], torch.full((2, 3), 5.0), rtol=0, atol=0)
    torch.testing.assert_close(weights["norm"], torch.linspace(0.0, 1.0, 7), rtol=0, atol=0)
    assert optimizer.keys() == {"a.weight.momentum", "num_updates"}
    assert int(optimizer["num_updates"]) == 5
    assert msgspec.structs.replace(position, sha256={}) == POSITION
    assert read_position(path) == position


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    assert latest_train_state(tmp_path / "none") is None
    for step in (5, 10, 100, 9):
        _save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    latest = latest_train_state(tmp_path)
    assert latest is not None
    assert read_position(latest).step == 100


def test_a_state_that_was_half_written_does_not_count(tmp_path: Path) -> None:
    path = _save(tmp_path)
    shutil.copytree(path, tmp_path / "step-00000010.partial")
    (tmp_path / "notes").mkdir()
    assert latest_train_state(tmp_path) == path


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path, name: str) -> None:
    path = _save(tmp_path)
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_train_state(path)
    assert str(caught.value) == (
        f"{path / name} is not the file that was saved (its SHA-256 differs): remove the folder {path} and "
        "resume from the state before it"
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = _save(tmp_path)
    (path / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match=rf"^cannot read the file {path}/optimizer.safetensors: No such file "):
        load_train_state(path)
    (path / "state.json").unlink()
    with pytest.raises(UserError, match=rf"^cannot read the training state {path}/state.json: No such file "):
        read_position(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "state.json is not valid JSON: "),
        ("{}", "the key stage is missing: add it"),
        ('{"stage": 1}', "stage: expected `str`, got `int`"),
    ],
)
def test_a_damaged_position_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = _save(tmp_path)
    (path / "state.json").write_text(text)
    with pytest.raises(UserError) as caught:
        load_train_state(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    _save(tmp_path)
    (tmp_path / "step-00000005" / "stale").write_bytes(b"")
    path = _save(tmp_path)
    assert sorted(file.name for file in path.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
