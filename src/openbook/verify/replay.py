"""Replay: train segments of a release again and compare every line of its ledger and every state root, bit for bit."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from openbook.checkpoint.state_root import state_roots
from openbook.checkpoint.train_state import load_train_state, state_path
from openbook.core.errors import CheckError, UserError
from openbook.core.files import read_json, sha256_file
from openbook.core.seeding import derive_seed
from openbook.data.shards import MANIFEST_FILE, read_manifest
from openbook.data.shards import verify as verify_data
from openbook.release.build import num_cores
from openbook.release.inputs import make_data, make_tokenizer
from openbook.release.manifest import CHECKPOINTS_PATH, DATA_PATH, LEDGER_PATH
from openbook.release.training import open_stage
from openbook.train.ledger import Entry, SavedState
from openbook.train.recipe import load_recipe
from openbook.train.segments import Segment, list_segments
from openbook.verify.difference import DIGITS, Difference
from openbook.verify.integrity import Integrity
from openbook.verify.ledger import describe
from openbook.verify.outcome import Outcome, Verdict
from openbook.verify.setting import Setting, read_setting

TOKENIZER_FILE = "tokenizer.json"


class _FoundError(Exception):
    """A difference, on its way out of whatever was running."""

    def __init__(self, difference: Difference) -> None:
        self.difference = difference
        super().__init__(difference.detail)


def replay_segments(folder: Path, integrity: Integrity, count: int, seed: int | None, threads: int | None) -> Outcome:
    """Train `count` segments again; see `openbook.verify.verification.verify`.

    Segments are drawn at random among those whose state at the start is there: below provenance/checkpoints, or in the
    build folder around the release. The first one needs no state. Where that is the only one, and where there are fewer
    than `count`, the first `count` are trained from nothing.

    Raises:
        UserError: there are fewer segments than `count`.
        CheckError: this release cannot be replayed, or not here.
    """
    setting = read_setting(folder, integrity, threads, "replay")
    segments = list_segments(setting.recipe)
    if count > len(segments):
        raise UserError(f"replay is {count}, {folder} has {len(segments)} segments: give at most that many")
    seed = secrets.randbits(32) if seed is None else seed
    states = _published_states(setting, segments)
    chosen, note, is_from_nothing = _choose(segments, states, count, seed)
    if is_from_nothing:
        states = {}
    outcome = Outcome(notes=[note, setting.note])
    with TemporaryDirectory(prefix="openbook-replay-") as name:
        inputs = Inputs(setting, Path(name))
        own_states = Path(name) / "states"
        try:
            for segment in chosen:
                _replay(setting, segment, len(segments), inputs, states, own_states if is_from_nothing else None)
        except _FoundError as found:
            outcome.differences.append(found.difference)
        if inputs.rebuilt:
            outcome.verdicts.append(inputs.verdict())
        if len(inputs.rebuilt) == len(setting.recipe.stages):
            outcome.data_left = None
    if not outcome.differences:
        outcome.verdicts.append(
            Verdict(words=f"REPLAYED {count}/{len(segments)} exact", coverage=_coverage(chosen, len(setting.entries)))
        )
        left = len(segments) - count
        outcome.training_left = f"the other {left} of {len(segments)} segments (--rebuild checks all)" if left else None
    return outcome


class Inputs:
    """The data of each stage: what stands in the build folder around the release, or else made again."""

    def __init__(self, setting: Setting, scratch: Path) -> None:
        self._setting, self._scratch = setting, scratch
        self._hashes = data_hashes(setting.folder)
        self.rebuilt: list[str] = []

    def data(self, index: int) -> Path:
        """The data folder of stage `index`; its manifest is the one that the release names.

        Raises:
            _FoundError: it is not.
        """
        stage = self._setting.recipe.stages[index]
        build = build_folder(self._setting)
        if build is not None and (build / "data" / stage.name).is_dir():
            path, what = build / "data" / stage.name, "changed"
        else:
            path, what = self._scratch / "data" / stage.name, "diverged"
            if not path.exists():
                make_data(self._setting.recipe, stage, self._tokenizer(), path, num_cores())
        actual, expected = sha256_file(path / MANIFEST_FILE), self._hashes.get(stage.name, "none")
        if actual != expected:
            detail = f"stage {stage.name}: manifest sha256 {actual[:DIGITS]}, {DATA_PATH} says {expected[:DIGITS]}"
            if what == "changed":
                raise _FoundError(Difference(path=str(path / MANIFEST_FILE), kind="changed", detail=detail))
            raise _FoundError(self._setting.difference(str(DATA_PATH), f"data made again from the recipe: {detail}"))
        if what == "diverged" and stage.name not in self.rebuilt:
            self.rebuilt.append(stage.name)
        try:
            verify_data(path, read_manifest(path))
        except UserError as error:
            detail = str(error).partition(": remove this")[0]
            raise _FoundError(Difference(path=str(path), kind="changed", detail=detail)) from error
        return path

    def verdict(self) -> Verdict:
        """What was made again."""
        documents = sum(stage.documents for stage in self._setting.recipe.stages if stage.name in self.rebuilt)
        names = ", ".join(self.rebuilt)
        coverage = f"the tokenizer, and stage {names}: {documents:,} documents, as in {DATA_PATH}"
        return Verdict(words="DATA REBUILT", coverage=coverage)

    def _tokenizer(self) -> Path:
        path = self._scratch / "tokenizer"
        if not path.exists():
            make_tokenizer(self._setting.recipe, path)
            actual, expected = (sha256_file(where / TOKENIZER_FILE) for where in (path, self._setting.folder))
            if actual != expected:
                detail = f"trained again from the recipe: sha256 {actual[:DIGITS]}, the release has {expected[:DIGITS]}"
                raise _FoundError(self._setting.difference(TOKENIZER_FILE, detail))
        return path


def data_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each stage's data manifest, by stage, as data.json of a release says.

    Raises:
        UserError: it cannot be read.
    """
    values = read_json(folder / DATA_PATH, "summary of the data")
    try:
        return {str(stage["stage"]): str(stage["manifest_sha256"]) for stage in values["stages"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"the summary of the data {folder / DATA_PATH} lacks {error}: get the release anew") from error


def build_folder(setting: Setting) -> Path | None:
    """The build folder that the release stands in, if it is one, and of the same recipe."""
    parent = setting.folder.resolve().parent
    try:
        is_build = (parent / "run.json").is_file() and load_recipe(parent / "recipe.toml").hash == setting.recipe.hash
    except UserError:
        return None
    return parent if is_build else None


def _published_states(setting: Setting, segments: Sequence[Segment]) -> dict[int, Path]:
    """By the number of a segment, the saved state at its start; the first segment has none and needs none."""
    build = build_folder(setting)
    places = [setting.folder / CHECKPOINTS_PATH, *([build / "train"] if build else [])]
    found: dict[int, Path] = {}
    for before, segment in pairwise(segments):
        stage = setting.recipe.stages[before.stage_index].name
        for place in places:
            path = state_path(place / stage, segment.first_step)
            if path.is_dir():
                found.setdefault(segment.number, path)
    return found


def _choose(
    segments: Sequence[Segment], states: dict[int, Path], count: int, seed: int
) -> tuple[list[Segment], str, bool]:
    """The segments to replay in order, how they were chosen, and whether they are trained from nothing."""
    total = len(segments)
    if count == total:
        return list(segments), f"all {total} segments, trained again from nothing", True
    candidates = [segment for segment in segments if segment.number == 1 or segment.number in states]
    if not states or count > len(candidates):
        reason = "no saved states" if not states else f"the states of only {len(states)} segments"
        note = (
            f"the segments could not be chosen, as there are {reason}: the first {count} of {total} were trained again "
            f"from nothing; a forged segment after step {segments[count - 1].last_step:,} would not be found"
        )
        return list(segments[:count]), note, True
    drawn = sorted(candidates, key=lambda segment: derive_seed(seed, "replay", segment.number))[:count]
    odds = f"with probability {count}/{len(candidates)} ({count / len(candidates):.1%})"
    note = f"segments drawn at random (--seed {seed}): one forged segment among {total} is found {odds}"
    if len(candidates) < total:
        note = (
            f"segments drawn at random (--seed {seed}) among the {len(candidates)} of {total} whose state is there: "
            f"one forged segment among those is found {odds}, among the others it would not be"
        )
    return sorted(drawn, key=lambda segment: segment.number), note, False


def _replay(
    setting: Setting,
    segment: Segment,
    total: int,
    inputs: Inputs,
    states: dict[int, Path],
    own_states: Path | None,
) -> None:
    """Train one segment and compare; it starts from nothing, a published state, or the last of `own_states`.

    Raises:
        _FoundError: the first difference.
    """
    stages, where = setting.recipe.stages, f"segment {segment.number} of {total}"
    data = inputs.data(segment.stage_index)
    start: Path | None = None
    published = states.get(segment.number)
    if published is not None:
        start = published
        _check_state(start, segment, setting)
    elif segment.number > 1:
        assert own_states is not None
        start = state_path(own_states, segment.first_step)
    try:
        opened = open_stage(
            setting.recipe, segment.stage_index, setting.layout, tokenizer=setting.folder, data=data, start_from=start
        )
        opened.loader.restore(opened.position.cursor)
    except (UserError, KeyError) as error:
        if published is None:
            raise
        detail = f"{where}: the state does not fit the recipe: {error}"  # though the ledger has its root
        raise _FoundError(Difference(path=str(published), kind="changed", detail=detail)) from error
    expected = setting.entries[segment.first_step : segment.last_step + 1]
    try:
        opened.run(_Comparison(setting, expected, where), own_states, until=segment.end)
    except CheckError as error:
        detail = f"{where} ({stages[segment.stage_index].name}): {error}"
        raise _FoundError(setting.difference(str(LEDGER_PATH), detail)) from error


def _check_state(path: Path, segment: Segment, setting: Setting) -> None:
    """A published state against the ledger line that it was saved after: the step, the root."""
    step = segment.first_step - 1
    expected = setting.entries[step].state
    assert expected is not None  # integrity has compared the ledger's shape with the recipe
    try:
        weights, optimizer, position = load_train_state(path)
    except UserError as error:
        detail = f"the state after step {step}: {str(error).partition(': remove the folder')[0]}"
        raise _FoundError(Difference(path=str(path), kind="changed", detail=detail)) from error
    roots = state_roots(weights, optimizer, position)
    stage = setting.entries[step].stage
    stage_step = sum(entry.stage == stage for entry in setting.entries[: step + 1])
    for name, actual, wanted in (
        ("stage", position.stage, stage),
        ("step", str(position.step), str(step + 1)),
        ("step of the stage", str(position.stage_step), str(stage_step)),
        ("weights root", roots.weights, expected.weights),
        ("state root", roots.state, expected.root),
    ):
        if actual != wanted:
            detail = f"the state after step {step}: {name} {actual[:DIGITS]}, the ledger says {wanted[:DIGITS]}"
            raise _FoundError(Difference(path=str(path), kind="changed", detail=detail))


def compare_steps(setting: Setting, entries: Sequence[Entry]) -> Iterator[Difference]:
    """The steps of a rebuilt ledger against the first ones of the release's: the first difference, if any."""
    comparison = _Comparison(setting, setting.entries, "rebuilt")
    try:
        for entry in entries:
            comparison.append(entry)
    except _FoundError as found:
        yield found.difference


class _Comparison:
    """Stands where the ledger stands in training, and holds each step against the line that is there."""

    def __init__(self, setting: Setting, expected: Sequence[Entry], where: str) -> None:
        self._setting, self._expected, self._where = setting, iter(expected), where

    def append(self, entry: Entry) -> None:
        """Compare one step.

        Raises:
            _FoundError: the first field that differs.
        """
        expected = next(self._expected)
        for (name, actual), (_, wanted) in zip(_fields(entry), _fields(expected), strict=True):
            if actual != wanted:
                detail = (
                    f"step {entry.step} (stage {entry.stage}, {self._where}) goes apart: {name} comes out as "
                    f"{describe(actual)}, the ledger says {describe(wanted)}"
                )
                raise _FoundError(self._setting.difference(str(LEDGER_PATH), detail))

    def sync(self) -> None:
        """Nothing is written."""


def _fields(entry: Entry) -> Iterator[tuple[str, Any]]:
    """Names and values in the order of cause and effect, so that the first difference is the nearest to its cause."""
    yield from (("batch digest", entry.batch), ("tokens", entry.tokens), ("learning rate", entry.lr))
    yield from (("loss", entry.loss), ("gradient norm", entry.grad_norm))
    state = entry.state or SavedState(root="none", weights="none", cursor={})
    yield from (("data cursor", state.cursor), ("weights root", state.weights), ("state root", state.root))
    yield from (("step", entry.step), ("stage", entry.stage))


def _coverage(chosen: Sequence[Segment], total_steps: int) -> str:
    spans: list[tuple[int, int]] = []
    for segment in chosen:
        if spans and spans[-1][1] + 1 == segment.first_step:
            spans[-1] = (spans[-1][0], segment.last_step)
        else:
            spans.append((segment.first_step, segment.last_step))
    steps = ", ".join(f"{first:,} to {last:,}" for first, last in spans)
    num_steps = sum(segment.num_steps for segment in chosen)
    numbers = f"segment{'s' if len(chosen) > 1 else ''} {', '.join(str(segment.number) for segment in chosen)}"
    return f"{numbers}: {num_steps:,} of {total_steps:,} steps ({steps}), each line and state root the same"
