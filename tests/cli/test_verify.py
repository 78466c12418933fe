"""`openbook verify`: exit 0, 1 or 2, and what stands on stdout and stderr."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from openbook.checkpoint import locate
from openbook.cli.main import main


@pytest.fixture
def release(made_release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_release, tmp_path / "release"))


def test_good_release(made_release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(made_release)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"INTEGRITY  {made_release}: 16 files, ")
    assert "not checked: who made the release (the manifest is not signed)" in captured.out
    assert captured.err == ""


def test_json(made_release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(made_release), "--json"]) == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out)
    assert values["verdict"] == "INTEGRITY"
    assert values["differences"] == []
    assert len(values["recipe_sha256"]) == 64


@pytest.mark.parametrize("as_json", [False, True])
def test_damaged_release(release: Path, as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    (release / "README.md").write_text("x")
    (release / "config.json").unlink()
    assert main(["verify", str(release), *(["--json"] if as_json else [])]) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        f"openbook: {release}: 2 files differ (README.md, config.json); get the release anew, or rebuild it\n"
    )
    if as_json:
        assert [item["path"] for item in json.loads(captured.out)["differences"]] == ["README.md", "config.json"]
    else:
        lines = captured.out.splitlines()
        assert lines[0].startswith("changed  README.md: sha256 expected ")
        assert lines[1].startswith("missing  config.json: expected ")
        assert len(lines) == 2


def test_bundled_name(made_release: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "releases_dir", lambda: made_release.parent)
    assert main(["verify", "release"]) == 0
    assert "INTEGRITY" in capsys.readouterr().out


def test_bad_input_is_one_line(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argument, message in [
        (str(tiny_folder), f"{tiny_folder} is not a release: it has no provenance/manifest.json; give a bundled name"),
        (str(tmp_path / "none"), "none"),
        ("nanoo", "unknown model 'nanoo'"),
    ]:
        assert main(["verify", argument]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("openbook: ")
        assert captured.err.count("\n") == 1
        assert message in captured.err
