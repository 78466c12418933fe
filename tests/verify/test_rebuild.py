"""A rebuild compares everything, and stops at the first difference."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from forger import edit_json, forge, seal
from openbook.train.ledger import Entry
from openbook.verify.verification import verify


def test_rebuilt_exact(trained: Path) -> None:
    result = verify(trained, rebuild=True)
    assert result.differences == ()
    assert [verdict.words for verdict in result.verdicts] == ["INTEGRITY", "DATA REBUILT", "REBUILT exact"]
    assert result.verdicts[2].coverage.startswith("11 steps, then ")
    assert list(result.not_checked) == [
        "who made the release (the manifest is not signed)",
        "what provenance/environment.json says of the machine and the time of the build, and the card repeats",
    ]


def _forged_loss(entries: list[Entry]) -> None:
    entries[8] = msgspec.structs.replace(entries[8], loss=1.5)


@pytest.mark.parametrize(
    ("path", "detail"),
    [
        ("tokenizer_config.json", "rebuilt: sha256 "),
        ("provenance/trace.jsonl", "step 8 (stage second, rebuilt) goes apart: loss comes out as 0x"),
        ("README.md", "rebuilt: sha256 "),
        ("provenance/evals/easy-medium/summary.json", "rebuilt: the figures come out otherwise"),
    ],
)
def test_the_first_difference_is_named(trained: Path, path: str, detail: str) -> None:
    if path.endswith("trace.jsonl"):
        forge(trained, _forged_loss)
    elif path.endswith("summary.json"):
        totals = json.loads((trained / path).read_text())["totals"]
        edit_json(trained / path, totals={**totals, "accuracy": 1.0})
    else:
        (trained / path).write_bytes((trained / path).read_bytes().replace(b" ", b"  ", 1))
    seal(trained)
    (difference,) = verify(trained, rebuild=True).differences
    assert (difference.kind, difference.path) == ("diverged", path)
    assert difference.detail.startswith(detail)


def test_a_file_too_many(trained: Path) -> None:
    (trained / "extra.txt").write_text("x")
    seal(trained)
    (difference,) = verify(trained, rebuild=True).differences
    assert str(difference) == "added    extra.txt: the rebuilt release has no such file"
