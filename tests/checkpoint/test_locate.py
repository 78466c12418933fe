"""Names of models: what is found, and what is said of a name that is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from openbook.checkpoint import locate as module
from openbook.checkpoint.locate import bundled_names, locate
from openbook.core.errors import UserError


@pytest.fixture
def releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with two bundled models and one folder that is none."""
    folder = tmp_path / "releases"
    for name in ("nano", "mini"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    (folder / "__pycache__").mkdir()
    monkeypatch.setattr(module, "releases_dir", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_bundled_names(releases: Path) -> None:
    assert bundled_names() == ["mini", "nano"]
    assert locate("nano") == releases / "nano"


def test_a_bundled_name_wins_over_a_folder_and_a_path_names_the_folder(releases: Path, tmp_path: Path) -> None:
    own = tmp_path / "nano"
    own.mkdir()
    (own / "config.json").write_text("{}")
    assert locate("nano") == releases / "nano"
    assert locate("./nano") == Path("nano")
    assert locate(own) == own


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "nanno",
            "unknown model 'nanno': did you mean 'nano'? "
            "bundled models: mini, nano; or give the path of a model folder",
        ),
        ("gpt", "unknown model 'gpt': bundled models: mini, nano; or give the path of a model folder"),
        ("  ", "the model's name is empty: bundled models: mini, nano; or give the path of a model folder"),
        (
            "Qwen/Qwen3-0.6B",
            "there is no folder Qwen/Qwen3-0.6B, and loading hub ids is not supported yet: download the model, then "
            "give its folder",
        ),
        (
            "x/model.gguf",
            "the model x/model.gguf is a GGUF file, which is not supported yet: "
            "give the folder of a model with config.json",
        ),
        (
            "./runs/nano",
            "there is no folder ./runs/nano: check the path; "
            "bundled models: mini, nano; or give the path of a model folder",
        ),
        (
            "releases",
            "the folder releases has no config.json, so it is no model: give a release or Hugging Face folder",
        ),
        (
            "releases/nano/config.json",
            "the model releases/nano/config.json is a file: expected a folder with config.json and model.safetensors",
        ),
    ],
)
def test_what_is_no_model_is_one_line(releases: Path, name: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        locate(name)
    assert str(error.value) == line
