"""Verify a release: its integrity, and if asked for, segments of its training or all of it again."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from openbook.checkpoint.locate import bundled_names, locate
from openbook.core.errors import UserError
from openbook.core.files import sha256_file
from openbook.release.manifest import MANIFEST_PATH
from openbook.verify.difference import Difference
from openbook.verify.integrity import Integrity, check_integrity
from openbook.verify.outcome import Outcome, Verdict


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """What was checked and what differs.

    verdict: "INTEGRITY" if nothing differs, "DIFFERS", or "UNDECIDED" if training came out otherwise where the numerics
    do not promise the same bits. verdicts: what holds, each with its coverage. notes: how it was found out.
    differences: none, or what is wrong. not_checked: what no verdict covers. num_parameters: as the header of the
    weights says; 0 if it cannot be read.
    """

    release: str
    verdict: Literal["INTEGRITY", "DIFFERS", "UNDECIDED"]
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]
    manifest_sha256: str
    recipe_sha256: str
    num_files: int
    num_bytes: int
    num_parameters: int
    differences: tuple[Difference, ...]
    not_checked: tuple[str, ...]


def verify(
    release: str | Path,
    *,
    replay: int = 0,
    rebuild: bool = False,
    seed: int | None = None,
    threads: int | None = None,
) -> Verification:
    """Check a release: files, recipe, weights and ledger against each other; then, if asked for, its training.

    Args:
        release: a bundled name, or a release folder.
        replay: segments of the training to run again and compare, step for step and bit for bit; 0 for none.
        rebuild: build the whole release again in a temporary folder and compare every file.
        seed: of the choice of segments; None draws one.
        threads: of the CPU backend; None takes what the build had.

    Raises:
        UserError: there is no such release, a file cannot be read, or there are fewer segments than `replay`.
        CheckError: what was asked for cannot be done with this release or on this machine.
    """
    if replay < 0:
        raise UserError(f"replay is {replay}, expected 0 or more segments")
    # A release that lost its config.json is no model any more, but it is still a release to be checked.
    is_folder = str(release) not in bundled_names() and Path(release).is_dir()
    folder = Path(release) if is_folder else locate(release)
    integrity = check_integrity(folder)
    outcome = Outcome(differences=integrity.differences)
    if not integrity.differences:
        if replay:
            from openbook.verify.replay import replay_segments

            outcome = replay_segments(folder, integrity, replay, seed, threads)
        if rebuild and not outcome.differences:
            from openbook.verify.rebuild import rebuild_release

            outcome = outcome.then(rebuild_release(folder, integrity, threads))
    return _result(folder, integrity, outcome)


def _result(folder: Path, integrity: Integrity, outcome: Outcome) -> Verification:
    files = integrity.manifest.files
    num_bytes = sum(entry.bytes for entry in files)
    coverage = (
        f"{folder}: {len(files)} files, {num_bytes / 1e6:.1f} MB, {integrity.num_parameters:,} parameters, "
        "all as in the manifest"
    )
    verdicts = [] if integrity.differences else [Verdict(words="INTEGRITY", coverage=coverage)]
    left = [text for text in (outcome.data_left, outcome.training_left) if text]
    verdict: Literal["INTEGRITY", "DIFFERS", "UNDECIDED"] = "INTEGRITY"
    if outcome.differences:
        is_undecided = all(difference.kind == "undecided" for difference in outcome.differences)
        verdict = "UNDECIDED" if is_undecided else "DIFFERS"
    return Verification(
        release=str(folder),
        verdict=verdict,
        verdicts=(*verdicts, *outcome.verdicts),
        notes=tuple(outcome.notes),
        manifest_sha256=sha256_file(folder / MANIFEST_PATH),
        recipe_sha256=integrity.manifest.recipe_sha256,
        num_files=len(files),
        num_bytes=num_bytes,
        num_parameters=integrity.num_parameters,
        differences=tuple(outcome.differences),
        not_checked=(*integrity.not_checked, *left, *outcome.not_checked),
    )
