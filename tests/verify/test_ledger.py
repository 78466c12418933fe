"""What a ledger shows without any training: its links, its steps, its learning rates, the weights at its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from forger import forge, seal
from openbook.core.errors import CheckError
from openbook.release.manifest import LEDGER_PATH
from openbook.train.ledger import Entry, read_ledger
from openbook.verify.verification import verify

LEDGER = str(LEDGER_PATH)


def _found(release: Path) -> list[tuple[str, str, str]]:
    return [(d.kind, d.path, d.detail) for d in verify(release).differences]


def test_an_edited_line_is_named_even_if_sealed(release: Path) -> None:
    path = release / LEDGER
    path.write_bytes(path.read_bytes().replace(b'"tokens":502', b'"tokens":503'))
    seal(release)
    assert _found(release) == [("invalid", LEDGER, "line 3: its link does not follow from the lines up to it")]


def _set(index: int, **changes: object) -> Callable[[list[Entry]], None]:
    def change(entries: list[Entry]) -> None:
        entries[index] = msgspec.structs.replace(entries[index], **changes)

    return change


def _drop(entries: list[Entry]) -> None:
    del entries[2]


def _drop_last(entries: list[Entry]) -> None:
    del entries[-1]


def _drop_and_renumber(entries: list[Entry]) -> None:
    del entries[2]
    for step, entry in enumerate(entries):
        entry.step = step


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (
            _set(1, lr=0.02),
            "step 1: the learning rate is 0x1.47ae147ae147bp-6 (0.02), "
            "the recipe's schedule gives 0x1.47ae147ae147bp-7 (0.01)",
        ),
        (_set(1, lr=0.010000000000000002), "step 1: the learning rate is 0x1.47ae147ae147cp-7 (0.01), "),
        (_set(1, lr=float("nan")), "step 1: the learning rate is nan (nan), the recipe's schedule gives "),
        (_drop, "line 3: it is step 3 of stage first, expected step 2 of stage first"),
        (_drop_and_renumber, "step 2: the learning rate is "),
        (_drop_last, "it has 6 steps, the recipe asks for 7"),
        (_set(2, stage="second"), "line 3: it is step 2 of stage second, expected step 2 of stage first"),
        (_set(3, state=None), "step 3: it has no state, expected one: the recipe says where segments end"),
    ],
)
def test_a_forged_ledger_with_good_links(release: Path, change: Callable[[list[Entry]], None], detail: str) -> None:
    forge(release, change)
    ((kind, path, found),) = _found(release)
    assert (kind, path) == ("invalid", LEDGER)
    assert found.startswith(detail)


def test_other_weights_than_those_of_the_last_line(release: Path) -> None:
    path = release / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    seal(release)
    ((kind, name, detail),) = _found(release)
    assert (kind, name) == ("invalid", "model.safetensors")
    root = read_ledger(release / LEDGER)[-1].state
    assert root is not None
    assert detail.startswith("weights root ")
    assert detail.endswith(f", the ledger ends with {root.weights[:12]}")


def test_a_ledger_without_states_is_whole_but_cannot_be_replayed(release: Path) -> None:
    lines = [
        f'{{"step":{e.step},"stage":"{e.stage}","batch":"{e.batch}","cursor":{{"epoch":0,"row":0,"document":1}},'
        f'"lr":{e.lr!r},"loss":{e.loss!r},"grad_norm":{e.grad_norm!r},"tokens":{e.tokens}}}\n'
        for e in read_ledger(release / LEDGER)
    ]
    (release / LEDGER).write_text("".join(lines))
    seal(release)
    result = verify(release)
    assert result.verdict == "INTEGRITY"
    reason = "its ledger holds no state roots (an earlier openbook wrote it): rebuild the recipe to get one that does"
    assert f"the steps of the training: {reason}" in result.not_checked
    for action, options in (("replay", {"replay": 1}), ("rebuild", {"rebuild": True})):
        with pytest.raises(CheckError) as caught:
            verify(release, **options)  # type: ignore[arg-type]
        assert str(caught.value) == f"cannot {action} {release}: {reason}"
