"""Replay passes on what was trained, and finds every forgery where it lies: the step, and what differs there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import openbook
from forger import edit_json, forge, seal
from openbook.checkpoint.safetensors_io import load_tensors, save_tensors
from openbook.checkpoint.state_root import state_roots
from openbook.checkpoint.train_state import load_train_state
from openbook.core.errors import CheckError, UserError
from openbook.core.files import sha256_file
from openbook.core.seeding import derive_seed
from openbook.release.manifest import ENVIRONMENT_PATH, LEDGER_PATH
from openbook.train.ledger import Entry
from openbook.verify.verification import Verification, verify

STATES = "provenance/checkpoints"


def _words(result: Verification) -> list[str]:
    return [verdict.words for verdict in result.verdicts]


def _bare(trained: Path) -> Path:
    """The release without its states."""
    shutil.rmtree(trained / STATES)
    edit_json(trained / ENVIRONMENT_PATH, keep_states=False)
    seal(trained)
    return trained


def _set(index: int, **changes: object) -> Callable[[list[Entry]], None]:
    def change(entries: list[Entry]) -> None:
        entries[index] = msgspec.structs.replace(entries[index], **changes)

    return change


def _difference(result: Verification) -> tuple[str, str, str]:
    (difference,) = result.differences
    return difference.kind, difference.path, difference.detail


def test_segments_are_drawn_and_the_odds_are_said(trained: Path) -> None:
    result = verify(trained, replay=2, seed=1)
    assert result.verdict == "INTEGRITY"
    assert _words(result)[-1] == "REPLAYED 2/5 exact"
    note = "segments drawn at random (--seed 1): one forged segment among 5 is found with probability 2/5 (40.0%)"
    assert result.notes[0] == note
    assert "the other 3 of 5 segments (--rebuild checks all)" in result.not_checked
    assert verify(trained, replay=2, seed=1).verdicts == result.verdicts
    others = {verify(trained, replay=1, seed=seed).verdicts[-1].coverage.split(":")[0] for seed in range(1, 9)}
    assert len(others) >= 3


def test_all_segments_from_nothing(trained: Path) -> None:
    result = openbook.verify(trained, replay=5)
    assert _words(result) == ["INTEGRITY", "DATA REBUILT", "REPLAYED 5/5 exact"]
    assert (
        result.verdicts[1].coverage
        == "the tokenizer, and stage first, second: 70 documents, as in provenance/data.json"
    )
    assert result.verdicts[2].coverage == (
        "segments 1, 2, 3, 4, 5: 11 of 11 steps (0 to 10), each line and state root the same"
    )
    assert result.notes[0] == "all 5 segments, trained again from nothing"
    assert result.not_checked == ("who made the release (the manifest is not signed)",)


def test_without_states_the_first_ones_and_it_says_why(trained: Path) -> None:
    result = verify(_bare(trained), replay=2)
    assert _words(result)[-1] == "REPLAYED 2/5 exact"
    assert result.verdicts[-1].coverage.startswith("segments 1, 2: 6 of 11 steps (0 to 5), ")
    assert result.notes[0] == (
        "the segments could not be chosen, as there are no saved states: the first 2 of 5 were trained again from "
        "nothing; a forged segment after step 5 would not be found"
    )
    assert "that the data comes out of its generators again (--rebuild)" in result.not_checked


def test_in_a_build_folder_its_data_and_states_serve(small_build: Path) -> None:
    result = verify(small_build / "release", replay=4, seed=0)
    assert _words(result) == ["INTEGRITY", "REPLAYED 4/5 exact"]
    assert "that the data comes out of its generators again (--rebuild)" in result.not_checked


def test_where_some_states_are_gone_the_draw_is_smaller_and_it_says_so(small_build: Path, tmp_path: Path) -> None:
    build = Path(shutil.copytree(small_build, tmp_path / "build"))
    for step in (3, 6):
        shutil.rmtree(build / "train" / "first" / f"step-{step:08}")
    release = _bare(build / "release")
    assert verify(release, replay=2, seed=2).notes[0] == (
        "segments drawn at random (--seed 2) among the 3 of 5 whose state is there: one forged segment among those is "
        "found with probability 2/3 (66.7%), among the others it would not be"
    )
    assert "there are the states of only 2 segments: the first 4 of 5" in verify(release, replay=4).notes[0]


def test_more_segments_than_there_are(trained: Path) -> None:
    with pytest.raises(UserError, match=r"replay is 6, .* has 5 segments: give at most that many"):
        verify(trained, replay=6)
    with pytest.raises(UserError, match="replay is -1, expected 0 or more segments"):
        verify(trained, replay=-1)


@pytest.mark.parametrize(
    ("index", "changes", "detail"),
    [
        (4, {"loss": 2.5}, "step 4 (stage first, segment 2 of 5) goes apart: loss comes out as 0x"),
        (4, {"grad_norm": 2.5}, "step 4 (stage first, segment 2 of 5) goes apart: gradient norm comes out as 0x"),
        (1, {"batch": "0" * 16}, "step 1 (stage first, segment 1 of 5) goes apart: batch digest comes out as "),
        (7, {"tokens": 1}, "step 7 (stage second, segment 4 of 5) goes apart: tokens comes out as "),
    ],
)
def test_a_forged_line(trained: Path, index: int, changes: dict[str, object], detail: str) -> None:
    forge(trained, _set(index, **changes))
    result = verify(trained, replay=5)
    kind, path, found = _difference(result)
    assert (result.verdict, kind, path) == ("DIFFERS", "diverged", str(LEDGER_PATH))
    assert found.startswith(detail)
    assert "the ledger says " in found
    assert not any("REPLAYED" in words for words in _words(result))


@pytest.mark.parametrize("field", ["root", "weights", "cursor"])
def test_a_forged_state_in_the_ledger(trained: Path, field: str) -> None:
    def change(entries: list[Entry]) -> None:
        state = entries[5].state
        assert state is not None
        value = {"epoch": 0, "row": 0, "document": 0} if field == "cursor" else "0" * 64
        entries[5].state = msgspec.structs.replace(state, **{field: value})

    forge(trained, change)
    names = {"root": "state root", "weights": "weights root", "cursor": "data cursor"}
    _, _, detail = _difference(verify(_bare(trained), replay=2))
    assert detail.startswith(f"step 5 (stage first, segment 2 of 5) goes apart: {names[field]} comes out as ")


def test_a_byte_of_a_checkpoint_in_the_release(trained: Path) -> None:
    path = trained / STATES / "first" / "step-00000003" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert _difference(verify(trained, replay=4, seed=0))[:2] == ("changed", str(path.relative_to(trained)))
    seal(trained)
    kind, where, detail = _difference(verify(trained, replay=4, seed=0))
    assert (kind, where) == ("changed", str(path.parent))
    assert detail == f"the state after step 2: {path} is not the file that was saved (its SHA-256 differs)"


@pytest.mark.parametrize(
    ("file", "root"), [("model.safetensors", "weights root"), ("optimizer.safetensors", "state root")]
)
def test_a_checkpoint_forged_with_all_its_hashes(trained: Path, file: str, root: str) -> None:
    path = trained / STATES / "first" / "step-00000003" / file
    tensors = {name: tensor.clone() for name, tensor in load_tensors(path).items()}
    next(tensor for name, tensor in tensors.items() if name.endswith(("norm.weight", ".momentum"))).flatten()[0] += 1e-6
    path.unlink()
    save_tensors(path, tensors)
    state = path.parent / "state.json"
    edit_json(state, sha256={**json.loads(state.read_text())["sha256"], file: sha256_file(path)})
    seal(trained)
    kind, where, detail = _difference(verify(trained, replay=4, seed=0))
    assert (kind, where) == ("changed", str(path.parent))
    assert detail.startswith(f"the state after step 2: {root} ")


def test_a_data_cursor_forged_in_a_checkpoint(trained: Path) -> None:
    path = trained / STATES / "first" / "step-00000003" / "state.json"
    edit_json(path, cursor={"epoch": 0, "row": 0, "document": 0})
    seal(trained)
    assert _difference(verify(trained, replay=4, seed=0))[2].startswith("the state after step 2: state root ")


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"stage_step": 0}, "the state after step 2: step of the stage 0, the ledger says 3"),
        ({"step": 4}, "the state after step 2: step 4, the ledger says 3"),
        ({"stage": "second"}, "the state after step 2: stage second, the ledger says first"),
        ({"cursor": {"epoch": 0}}, "segment 2 of 5: the state does not fit the recipe: "),
        ({"cursor": {"epoch": 0, "row": 99, "document": 0}}, "segment 2 of 5: the state does not fit the recipe: "),
    ],
)
def test_a_state_of_another_place_with_its_root_in_the_ledger(
    trained: Path, changes: dict[str, object], detail: str
) -> None:
    """Nothing of it may end in a traceback, nor pass."""
    path = trained / STATES / "first" / "step-00000003"
    edit_json(path / "state.json", **changes)
    roots = state_roots(*load_train_state(path))

    def change(entries: list[Entry]) -> None:
        state = entries[2].state
        assert state is not None
        entries[2].state = msgspec.structs.replace(state, root=roots.state)

    forge(trained, change)
    kind, where, found = _difference(verify(trained, replay=1, seed=_seed_that_draws(2)))
    assert (kind, where) == ("changed", str(path))
    assert found.startswith(detail)


def _seed_that_draws(number: int) -> int:
    """A seed with which one of five segments drawn is this one."""
    draws = {seed: min(range(1, 6), key=lambda n: derive_seed(seed, "replay", n)) for seed in range(40)}
    return next(seed for seed, drawn in draws.items() if drawn == number)


def test_a_byte_of_a_shard(small_build: Path, tmp_path: Path) -> None:
    build = Path(shutil.copytree(small_build, tmp_path / "build"))
    shard = build / "data" / "first" / "rows-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    kind, path, detail = _difference(verify(build / "release", replay=2, seed=1))
    assert (kind, path) == ("changed", str(shard.parent))
    assert detail.startswith(f"the data file {shard} is damaged (SHA-256 ")

    manifest = shard.parent / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    edit_json(manifest, files=[{**f, "sha256": sha256_file(shard)} if f["rows"] else f for f in files])
    kind, path, detail = _difference(verify(build / "release", replay=2, seed=1))
    assert (kind, path) == ("changed", str(manifest))
    assert detail.startswith("stage first: manifest sha256 ")


def test_other_data_than_the_recipes(trained: Path) -> None:
    path = trained / "provenance" / "data.json"
    stages = json.loads(path.read_text())["stages"]
    edit_json(path, stages=[{**stages[0], "manifest_sha256": "0" * 64}, *stages[1:]])
    seal(trained)
    kind, where, detail = _difference(verify(trained, replay=5))
    assert (kind, where) == ("diverged", "provenance/data.json")
    assert detail.startswith("data made again from the recipe: stage first: manifest sha256 ")
    assert detail.endswith("provenance/data.json says 000000000000")


def test_elsewhere_the_fast_profile_proves_nothing(trained: Path) -> None:
    edit_json(trained / ENVIRONMENT_PATH, machine="Another, 8 cores")
    forge(trained, _set(1, loss=2.5))
    result = verify(trained, replay=5)
    assert result.verdict == "UNDECIDED"
    kind, _, detail = _difference(result)
    assert kind == "undecided"
    assert "this proves nothing, as without the exact profile the bits are those of the build's machine" in detail
    assert "otherwise here: machine Another, 8 cores, here " in detail


def test_what_cannot_be_done_is_said_in_one_line(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_json(trained / ENVIRONMENT_PATH, device="cuda")
    seal(trained)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(CheckError, match=r"^cannot replay .*: it was trained on cuda, and torch sees no such device"):
        verify(trained, replay=1)
    edit_json(trained / ENVIRONMENT_PATH, device="cpu", is_compiled=True)
    seal(trained)
    monkeypatch.setattr("openbook.verify.setting.has_compiler", lambda: False)
    with pytest.raises(CheckError, match=r"^cannot rebuild .*torch.compile: install a C\+\+ compiler$"):
        verify(trained, rebuild=True)
    manifest = trained / "provenance" / "manifest.json"
    edit_json(trained / ENVIRONMENT_PATH, is_compiled=False)
    seal(trained)
    edit_json(manifest, openbook="9.9")
    with pytest.raises(CheckError, match=r"^cannot replay .*: openbook 9.9 made it, this is .*: install that version$"):
        verify(trained, replay=1)
