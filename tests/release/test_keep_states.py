"""A build that keeps its states ships them all; one that does not keeps the newest two of each stage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from openbook.cli.main import main
from openbook.core.files import sha256_file
from openbook.release.build import build
from openbook.release.manifest import read_manifest

STATES = ["first/step-00000003", "first/step-00000006", "first/step-00000007", "second/step-00000009"]
STATES += ["second/step-00000011"]


def _states(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/step-*"))


def test_all_states_are_kept_and_shipped(small_build: Path) -> None:
    assert _states(small_build / "train") == STATES
    shipped = small_build / "release" / "provenance" / "checkpoints"
    assert _states(shipped) == STATES
    for path in shipped.rglob("*.safetensors"):
        assert sha256_file(path) == sha256_file(small_build / "train" / path.relative_to(shipped))
    named = [entry.path for entry in read_manifest(small_build / "release").files]
    assert f"provenance/checkpoints/{STATES[0]}/model.safetensors" in named


def test_without_it_two_a_stage_are_left_and_the_weights_are_the_same(small_build: Path, tmp_path: Path) -> None:
    out = tmp_path / "build"
    release = build(small_build / "recipe.toml", out, threads=1, is_compiled=False, workers=1)
    assert _states(out / "train") == STATES[1:]
    assert not (release / "provenance" / "checkpoints").exists()
    for name in ("model.safetensors", "provenance/trace.jsonl"):
        assert sha256_file(release / name) == sha256_file(small_build / "release" / name)


def test_a_resume_cannot_bring_states_back(
    small_build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, recipe = tmp_path / "build", str(small_build / "recipe.toml")
    layout = ["--no-compile", "--threads", "1", "--workers", "1"]
    assert main(["build", recipe, "--out", str(out), "--until", "tokenizer", *layout]) == 0
    assert main(["build", recipe, "--out", str(out), "--resume", "--keep-states"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "openbook: --resume: --keep-states is given, the build began without it and has dropped states by now: "
        "resume without it, or build into a new folder"
    )


def test_a_resume_keeps_states_if_the_build_began_so(small_build: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(small_build, tmp_path / "build"))
    for path in (out / "release", out / "evals", out / "model", out / "train" / "second"):
        shutil.rmtree(path)
    release = build(out / "recipe.toml", out, resume=True, workers=1)
    assert _states(release / "provenance" / "checkpoints") == STATES
    assert sha256_file(release / "model.safetensors") == sha256_file(small_build / "release" / "model.safetensors")
