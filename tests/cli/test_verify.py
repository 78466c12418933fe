"""`openbook verify`: exit 0, 1 or 2, and what stands on stdout and stderr."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from forger import forge
from openbook.checkpoint import locate
from openbook.cli.main import main
from openbook.train.ledger import Entry


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


def test_replay(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(trained), "--replay", "1", "--seed", "6", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = [line.split("  ")[0] for line in lines]
    assert words[0] == "INTEGRITY"
    assert "REPLAYED 1/5 exact" in words
    assert (
        "note: segments drawn at random (--seed 6): one forged segment among 5 is found with probability 1/5 (20.0%)"
        in lines
    )
    assert lines[-1] == "not checked: the other 4 of 5 segments (--rebuild checks all)"


@pytest.mark.parametrize("as_json", [False, True])
def test_a_replay_that_goes_apart(trained: Path, as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def change(entries: list[Entry]) -> None:
        entries[4].loss = 2.5

    forge(trained, change)
    assert main(["verify", str(trained), "--replay", "5", *(["--json"] if as_json else [])]) == 1
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    start = f"openbook: {trained}: provenance/trace.jsonl: "
    assert error.startswith(f"{start}step 4 (stage first, segment 2 of 5) goes apart: loss comes out as 0x")
    assert error.endswith("), the ledger says 0x1.4p+1 (2.5)")
    detail = error.removeprefix(start)
    if as_json:
        values = json.loads(captured.out)
        assert values["verdict"] == "DIFFERS"
        assert [verdict["words"] for verdict in values["verdicts"]] == ["INTEGRITY", "DATA REBUILT"]
        assert [item["detail"] for item in values["differences"]] == [detail]
    else:
        assert f"diverged provenance/trace.jsonl: {detail}" in captured.out.splitlines()
        assert "REPLAYED" not in captured.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "2"], "--threads is for --replay or --rebuild: give one of them too"),
        (["--rebuild", "--seed", "2"], "--seed chooses the segments of --replay: give that too"),
        (["--replay", "0"], "0 is not in the range x>=1"),
        (["--replay", "3"], "has 2 segments: give at most that many"),
    ],
)
def test_options_that_do_not_fit(
    made_release: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(made_release), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err
