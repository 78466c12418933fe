"""Rebuild: the whole build again in a temporary folder, and every file of the release compared."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from openbook.core.errors import CheckError
from openbook.core.files import read_json, sha256_file
from openbook.data.shards import MANIFEST_FILE
from openbook.release.assemble import assemble_release
from openbook.release.build import build
from openbook.release.manifest import DATA_PATH, ENVIRONMENT_PATH, LEDGER_PATH, RECIPE_PATH, list_files
from openbook.train.ledger import read_ledger
from openbook.verify.difference import DIGITS, Difference
from openbook.verify.integrity import Integrity
from openbook.verify.outcome import Outcome, Verdict
from openbook.verify.replay import compare_steps, data_hashes
from openbook.verify.setting import Setting, read_setting

# How fast and where is all that a rebuild cannot repeat.
NOT_REPEATED = f"what {ENVIRONMENT_PATH} says of the machine and the time of the build, and the card repeats"


def rebuild_release(folder: Path, integrity: Integrity, threads: int | None) -> Outcome:
    """Build the release again; see `openbook.verify.verification.verify`. It stops where the first difference is.

    Raises:
        UserError: the disk is full.
        CheckError: this release cannot be rebuilt, or not here.
    """
    setting = read_setting(folder, integrity, threads, "rebuild")
    outcome = Outcome(notes=[setting.note])
    with TemporaryDirectory(prefix="openbook-rebuild-") as name:
        difference = next(_differences(setting, Path(name) / "build"), None)
    if difference:
        outcome.differences.append(difference)
        return outcome
    stages = setting.recipe.stages
    documents = sum(stage.documents for stage in stages)
    outcome.verdicts = [
        Verdict(
            words="DATA REBUILT",
            coverage=f"the tokenizer, and {len(stages)} stages: {documents:,} documents, as in {DATA_PATH}",
        ),
        Verdict(
            words="REBUILT exact",
            coverage=f"{len(setting.entries):,} steps, then {len(integrity.manifest.files)} files, all the same: "
            "tokenizer, ledger, weights, evaluation and card",
        ),
    ]
    outcome.not_checked = [NOT_REPEATED]
    outcome.data_left = outcome.training_left = None
    return outcome


def _differences(setting: Setting, out: Path) -> Iterator[Difference]:
    """Build step by step, and say what differs as soon as it does."""
    steps = ["tokenizer", *(stage.name for stage in setting.recipe.stages), "evals"]
    hashes = data_hashes(setting.folder)
    for number, step in enumerate(steps):
        try:
            _build(setting, out, step, is_first=number == 0)
        except CheckError as error:
            yield setting.difference(str(LEDGER_PATH), str(error))
            return
        if step == "tokenizer":
            yield from _compare(setting, out / "tokenizer", list_files(out / "tokenizer"))
        elif step != "evals":
            actual = sha256_file(out / "data" / step / MANIFEST_FILE)
            if actual != hashes.get(step):
                detail = (
                    f"stage {step}: manifest sha256 {actual[:DIGITS]}, expected {hashes.get(step, 'none')[:DIGITS]}"
                )
                yield setting.difference(str(DATA_PATH), f"data made again from the recipe: {detail}")
            yield from compare_steps(setting, read_ledger(out / "trace.jsonl"))
    # The record of the run is taken over: with it the card and the report must come out the same, too.
    shutil.copyfile(setting.folder / ENVIRONMENT_PATH, out / "run.json")
    release = out / "release"
    assemble_release(out, release, out / "model")
    files = list_files(release)
    first = [str(path) for path in (RECIPE_PATH, LEDGER_PATH, "config.json", "model.safetensors")]
    yield from _compare(setting, release, [*first, *(path for path in files if path not in first)])
    for path in sorted(set(list_files(setting.folder)) - set(files)):
        yield Difference(path=path, kind="added", detail="the rebuilt release has no such file")


def _build(setting: Setting, out: Path, until: str, *, is_first: bool) -> None:
    build(
        setting.folder / RECIPE_PATH,
        out,
        resume=not is_first,
        until=until,
        device=setting.layout.device,
        threads=setting.layout.threads,
        is_compiled=setting.layout.is_compiled,
        keep_states=setting.run.keep_states,
    )


def _compare(setting: Setting, made: Path, paths: list[str]) -> Iterator[Difference]:
    """Files below `made` against those of the release."""
    for path in paths:
        there, here = setting.folder / path, made / path
        if not there.is_file():
            yield Difference(path=path, kind="missing", detail="the rebuilt release has this file")
        elif path.endswith("summary.json"):
            if _without_time(there) != _without_time(here):
                yield setting.difference(path, "rebuilt: the figures come out otherwise")
        elif sha256_file(here) != sha256_file(there):
            actual, expected = sha256_file(here)[:DIGITS], sha256_file(there)[:DIGITS]
            yield setting.difference(path, f"rebuilt: sha256 {actual}, the release has {expected}")


def _without_time(path: Path) -> dict[str, Any]:
    values = read_json(path, "evaluation summary")
    return {name: value for name, value in values.items() if name != "seconds"}
