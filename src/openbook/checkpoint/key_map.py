"""Tensor names in Hugging Face checkpoints and in our models: one table per family, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from openbook.checkpoint.raw_matrix import RawMatrix
from openbook.core.errors import UserError
from openbook.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

MISMATCH = "weights and config.json do not belong together, fetch both again"

# What joins parts is given tensors; that of a family in `raw_weights.RAW_FAMILIES` may be given a `RawMatrix` too.
Join = Callable[[list[Any], ModelConfig], Any]
Split = Callable[["Tensor", ModelConfig], "Sequence[Tensor]"]


@dataclass(frozen=True)
class Entry:
    """One of our tensors and the Hugging Face tensors it is made of.

    `{layer}` in a name stands for every index in `layers` (all decoder layers), `{part}` in one of theirs for every
    index in `parts` (experts, say): names with it follow one another, part by part.
    rows: the first axis of each of theirs; ours stacks them along it. join and split: the two ways between theirs and
    ours where it is not that. accepts_ours: files may also hold our tensor itself, under our name. is_float32: it is
    kept in float32 whatever the rest is loaded in.
    """

    ours: str
    theirs: tuple[str, ...]
    rows: Callable[[ModelConfig], tuple[int, ...]] | None = None
    join: Join | None = None
    split: Split | None = None
    layers: Callable[[ModelConfig], Collection[int]] | None = None
    parts: Callable[[ModelConfig], Collection[int]] | None = None
    is_present: Callable[[ModelConfig], bool] | None = None
    accepts_ours: bool = False
    is_float32: bool = False


@dataclass(frozen=True)
class KeyMap:
    """A family's table.

    renames: (pattern, replacement) for `re.sub`, applied to names in files: other spellings of the same names.
    ignored: patterns of names that hold no weights (masks, frequencies), or none of ours. skipped: more of them, that
    depend on the configuration.
    embedding: their name of what may be tied to lm_head.weight.
    """

    entries: tuple[Entry, ...]
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    skipped: Callable[[ModelConfig], tuple[str, ...]] | None = None
    embedding: str = "model.embed_tokens.weight"


def same(name: str, layers: Callable[[ModelConfig], Collection[int]] | None = None) -> Entry:
    """A tensor that both sides call `name`."""
    return Entry(name, (name,), layers=layers)


def matched(
    tensors: Mapping[str, Any], config: ModelConfig, table: KeyMap, where: str
) -> Iterator[tuple[Entry, Callable[[], list[Any]]]]:
    """Each of our tensors in a checkpoint, spelled out, and what reads the parts that it is made of.

    Names are checked before this returns, shapes as parts are read.

    Args:
        tensors: of the checkpoint, read when asked for: anything with a `shape`. Each is asked for once, and not kept.
        where: names the checkpoint in messages.

    Raises:
        UserError: a tensor is missing, is left over, or has another number of rows than `config` says.
    """
    names = names_in(tensors, config, table, where)
    entries = [
        same(entry.ours) if entry.accepts_ours and entry.ours in names else entry for entry in spell_out(table, config)
    ]
    require_same_names(names.keys(), {name for entry in entries for name in entry.theirs}, where)

    def read(entry: Entry) -> list[Any]:
        parts = [tensors[names[name]] for name in entry.theirs]
        for name, part, rows in zip(entry.theirs, parts, entry.rows(config) if entry.rows else (), strict=False):
            expected = (rows, config.hidden_size) if len(part.shape) == 2 else (rows,)
            if tuple(part.shape) != expected:
                raise UserError(
                    f"{where}: {name} has shape {list(part.shape)}, config.json says {list(expected)}: {MISMATCH}"
                )
        return parts

    return ((entry, partial(read, entry)) for entry in entries)


def unfitting(entry: Entry, parts: Sequence[Any], where: str) -> UserError:
    """The refusal of parts that cannot be put together."""
    shapes = ", ".join(str(list(part.shape)) for part in parts[:3])
    return UserError(
        f"{where}: {entry.theirs[0]} and its like have shapes {shapes}, which do not fit together: {MISMATCH}"
    )


def names_in(tensors: Mapping[str, Any], config: ModelConfig, table: KeyMap, where: str) -> dict[str, str]:
    """The names that the table has for a checkpoint's tensors, and under each the one that the checkpoint has.

    Left out is what holds no weights, and a tied matrix where it stands a second time.

    Raises:
        UserError: the tied matrix stands there twice and the two differ.
    """
    ignored = _ignored(table, config)
    names = {_rename(name, table): name for name in tensors if not _matches(name, ignored)}
    if config.tie_word_embeddings and "lm_head.weight" in names:
        # Some files store the tied matrix twice. That is fine as long as the two agree.
        head, embedding = names.pop("lm_head.weight"), names.get(table.embedding)
        if embedding is not None and not _is_equal(tensors[head], tensors[embedding]):
            raise UserError(
                f"{where}: lm_head.weight differs from {table.embedding} although config.json ties them: "
                "set tie_word_embeddings to false there"
            )
    return names


def require_names(names: Collection[str], config: ModelConfig, table: KeyMap, where: str) -> None:
    """Check that a checkpoint's tensor names are those of its family, without reading a tensor.

    Raises:
        UserError: one is missing or left over.
    """
    ignored = _ignored(table, config)
    given = {_rename(name, table) for name in names if not _matches(name, ignored)}
    if config.tie_word_embeddings:
        given.discard("lm_head.weight")
    require_same_names(given, {name for entry in spell_out(table, config) for name in entry.theirs}, where)


def spell_out(table: KeyMap, config: ModelConfig) -> Iterator[Entry]:
    """The table with layers and parts spelled out, without what this configuration has not."""
    for entry in table.entries:
        if entry.ours == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if entry.is_present is not None and not entry.is_present(config):
            continue
        names = entry.theirs
        if entry.parts is not None:
            names = tuple(name.replace("{part}", str(part)) for part in entry.parts(config) for name in names)
        if "{layer}" not in entry.ours:
            yield _renamed(entry, entry.ours, names)
            continue
        for layer in entry.layers(config) if entry.layers else range(config.num_hidden_layers):
            yield _renamed(
                entry,
                entry.ours.replace("{layer}", str(layer)),
                tuple(name.replace("{layer}", str(layer)) for name in names),
            )


def _renamed(entry: Entry, ours: str, theirs: tuple[str, ...]) -> Entry:
    return replace(entry, ours=ours, theirs=theirs, layers=None, parts=None, is_present=None)


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, RawMatrix):
        return one.equals(other)
    import torch

    return torch.equal(one, other)


def _rename(name: str, table: KeyMap) -> str:
    for pattern, replacement in table.renames:
        name = re.sub(pattern, replacement, name)
    return name


def _ignored(table: KeyMap, config: ModelConfig) -> tuple[str, ...]:
    return table.ignored + (table.skipped(config) if table.skipped else ())


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def require_same_names(given: Collection[str], expected: Collection[str], where: str) -> None:
    """Check that the names of tensors are those that are expected.

    Raises:
        UserError: one is missing or left over.
    """
    given, expected = set(given), set(expected)
    for kind, names in (("lacks", expected - given), ("has unknown", given - expected)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{where} {kind} tensors {shown}: {MISMATCH}")
