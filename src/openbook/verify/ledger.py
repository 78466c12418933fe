"""Checks of a ledger that need no training: its links, its steps, its learning rates, and the weights at its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openbook.core.errors import UserError
from openbook.core.hex_float import hex_float
from openbook.release.manifest import LEDGER_PATH
from openbook.train.ledger import Entry, first_broken_link, read_ledger
from openbook.train.recipe import Recipe
from openbook.train.schedule import learning_rate
from openbook.train.segments import is_saved_after
from openbook.verify.difference import DIGITS, Difference

NO_STATES = "its ledger holds no state roots (an earlier openbook wrote it): rebuild the recipe to get one that does"


def has_states(entries: list[Entry]) -> bool:
    """Whether a ledger holds state roots, without which nothing can be replayed."""
    return any(entry.state is not None for entry in entries)


def check_ledger(folder: Path, recipe: Recipe | None) -> tuple[list[Difference], list[Entry]]:
    """The first thing wrong with the ledger of a release, if any, and its entries.

    Args:
        folder: the release.
        recipe: the release's own; None checks the links only.
    """
    path = folder / LEDGER_PATH
    if not path.is_file():
        return [], []  # the comparison of files says so
    try:
        entries = read_ledger(path)
    except UserError as error:
        return [_invalid(str(error))], []
    if not has_states(entries):
        return [], entries
    broken = first_broken_link(path)
    if broken is not None:
        return [_invalid(f"line {broken + 1}: its link does not follow from the lines up to it")], entries
    problem = next(_problems(entries, recipe), None) if recipe else None
    return [_invalid(problem)] if problem else [], entries


def check_weights(folder: Path, entries: list[Entry]) -> list[Difference]:
    """The weights of a release against the root of the weights in the last line of its ledger."""
    state = entries[-1].state if entries else None
    if state is None:
        return []
    from openbook.checkpoint.folder import load_model
    from openbook.checkpoint.state_root import weights_root
    from openbook.ops.torch_ops import TorchOps

    try:
        actual = weights_root(dict(load_model(folder, TorchOps()).named_parameters()))
    except UserError as error:
        return [Difference(path="model.safetensors", kind="invalid", detail=str(error))]
    if actual == state.weights:
        return []
    detail = f"weights root {actual[:DIGITS]}, the ledger ends with {state.weights[:DIGITS]}"
    return [Difference(path="model.safetensors", kind="invalid", detail=detail)]


def describe(value: Any) -> str:
    """A value of a ledger line in a message: floats with every bit and in decimal."""
    if isinstance(value, float):
        return f"{hex_float(value)} ({value:.6g})"
    return str(value)


def _problems(entries: list[Entry], recipe: Recipe) -> Iterator[str]:
    expected = [(stage, step) for stage in recipe.stages for step in range(stage.steps)]
    for number, (entry, (stage, stage_step)) in enumerate(zip(entries, expected, strict=False)):
        where = f"line {number + 1}"
        if (entry.step, entry.stage) != (number, stage.name):
            yield (
                f"{where}: it is step {entry.step} of stage {entry.stage}, expected step {number} of stage {stage.name}"
            )
        lr = learning_rate(stage.schedule, stage_step, stage.steps)
        if entry.lr != lr:
            yield (
                f"step {number}: the learning rate is {describe(entry.lr)}, the recipe's schedule gives {describe(lr)}"
            )
        if (entry.state is not None) != is_saved_after(stage, stage_step + 1):
            given, wanted = ("a", "none") if entry.state else ("no", "one")
            yield f"step {number}: it has {given} state, expected {wanted}: the recipe says where segments end"
    if len(entries) != len(expected):
        yield f"it has {len(entries)} steps, the recipe asks for {len(expected)}"


def _invalid(detail: str) -> Difference:
    return Difference(path=str(LEDGER_PATH), kind="invalid", detail=detail)
