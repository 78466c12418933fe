"""In the exact profile a release replays on any thread count and instruction set, and a difference always counts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from forger import edit_json, forge
from openbook.ops import _native as native
from openbook.release.manifest import ENVIRONMENT_PATH
from openbook.train.ledger import Entry
from openbook.verify.verification import verify


@pytest.fixture
def exact(exact_build: Path, tmp_path: Path, one_process: None) -> Iterator[Path]:
    """A copy of the release; the core's settings are put back afterwards."""
    isa, threads = native.isa(), native.num_threads()
    yield Path(shutil.copytree(exact_build / "release", tmp_path / "exact"))
    native.set_isa(isa)
    native.set_num_threads(threads)


@pytest.mark.parametrize("isa", native.available_isas())
def test_replayed_with_other_threads_on_every_instruction_set(exact: Path, isa: str) -> None:
    native.set_isa(isa)
    result = verify(exact, replay=5, threads=3)
    assert result.differences == ()
    assert result.verdicts[-1].words == "REPLAYED 5/5 exact"
    there = f"{native.available_isas()[-1]}, 1 thread"
    note = "profile exact: the bits do not depend on machine, instruction set or threads"
    assert f"{note} ({there}; here {isa}, 3 threads)" in result.notes


def test_rebuilt_with_other_threads(exact: Path) -> None:
    result = verify(exact, rebuild=True, threads=2)
    assert result.differences == ()
    assert result.verdicts[-1].words == "REBUILT exact"


def test_what_goes_apart_on_another_machine_is_a_difference(exact: Path) -> None:
    def change(entries: list[Entry]) -> None:
        entries[1] = msgspec.structs.replace(entries[1], loss=2.5)

    edit_json(exact / ENVIRONMENT_PATH, machine="Another, 8 cores")
    forge(exact, change)
    result = verify(exact, replay=5)
    assert result.verdict == "DIFFERS"
    assert result.differences[0].kind == "diverged"
    assert "proves nothing" not in result.differences[0].detail
