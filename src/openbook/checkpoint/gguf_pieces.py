"""Which stored tensors of a GGUF file make each Hugging Face tensor. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from openbook.checkpoint.gguf_io import Bytes, GgufFile, GgufTensor
from openbook.checkpoint.gguf_names import Rule, Values, rules_for
from openbook.checkpoint.raw_matrix import RawMatrix
from openbook.core.errors import UserError

_MOST_EXPERTS = 4096
# What the configuration says already.
_IGNORED = frozenset({"rope_freqs.weight"})


@dataclass(frozen=True)
class Piece:
    """A tensor of a file, or piece number `index` of it, of `shape`."""

    tensor: GgufTensor
    shape: tuple[int, ...]
    index: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.tensor.format.num_bytes(self.shape)

    @property
    def raw(self) -> Bytes:
        """Its bytes as they stand, uint8 [num_bytes]: a view of the mapped file."""
        return self.tensor.raw[self.index * self.num_bytes : (self.index + 1) * self.num_bytes]


class Recipe(NamedTuple):
    """What a Hugging Face tensor is made of, and how."""

    rule: Rule
    pieces: list[Piece]


def recipes(file: GgufFile, values: Values) -> dict[str, Recipe]:
    """How each Hugging Face tensor of a file is made, by its name; `values` of its config.json.

    Raises:
        UserError: the file has tensors that we do not know, or experts of an unexpected shape.
    """
    found: dict[str, Recipe] = {}
    unread = set(file.tensors) - _IGNORED
    for rule, layer in _spelled_out(file):
        parts = [file.tensors.get(name.format(layer=layer)) for name in rule.gguf]
        present = [part for part in parts if part is not None]
        if len(present) < len(parts) or not rule.is_meant(values):
            continue
        unread -= {part.name for part in present}
        for name, pieces in _pieces(rule, layer, present, file.path):
            found.setdefault(name, Recipe(rule, pieces))
    if unread:
        shown = ", ".join(sorted(unread)[:3]) + (f" and {len(unread) - 3} more" if len(unread) > 3 else "")
        raise UserError(
            f"{file.path} has tensors that {file.metadata['general.architecture']} models do not have: {shown}: use "
            "another model"
        )
    return found


def unfitting(path: Path, name: str, pieces: list[Piece]) -> UserError:
    """The refusal of pieces that cannot be put together."""
    shapes = ", ".join(str(list(piece.shape)) for piece in pieces)
    return UserError(f"{path}: {name} cannot be made of tensors of the shapes {shapes}: fetch the file again")


class RawGguf(Mapping[str, RawMatrix]):
    """The tensors of a dense model's file under Hugging Face's names, as stored; each is made when it is asked for.

    They are views of the mapped file, but for rows in another order and for formats that are expanded.
    """

    def __init__(self, path: Path, values: Values, made_of: Mapping[str, Recipe]) -> None:
        self._path, self._values, self._made_of = path, values, made_of

    def __getitem__(self, name: str) -> RawMatrix:
        rule, pieces = self._made_of[name]
        parts = [RawMatrix.stored(piece.raw, piece.tensor.format.name, piece.shape) for piece in pieces]
        try:
            made: Any = rule.read(parts, self._values)
        except (ValueError, IndexError) as error:
            raise unfitting(self._path, name, pieces) from error
        assert isinstance(made, RawMatrix)
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._made_of)

    def __len__(self) -> int:
        return len(self._made_of)


def _spelled_out(file: GgufFile) -> Iterator[tuple[Rule, int]]:
    """As `rules_for`, for the layers that a file has."""
    found = (re.match(r"blk\.(\d{1,5})\.", name) for name in file.tensors)
    layers = sorted({int(match[1]) for match in found if match})
    return rules_for(str(file.metadata["general.architecture"]), layers)


def _pieces(rule: Rule, layer: int, found: list[GgufTensor], path: Path) -> Iterator[tuple[str, list[Piece]]]:
    """The Hugging Face names of a rule with the bytes each is made of."""
    if "{expert}" not in rule.hf:
        yield rule.hf.format(layer=layer), [Piece(tensor, tensor.shape, 0) for tensor in found]
        return
    (tensor,) = found
    if len(tensor.shape) != 3 or tensor.shape[0] > _MOST_EXPERTS:
        raise UserError(
            f"{path}: {tensor.name} has the shape {list(tensor.shape)}, expected [experts, out, in] with at most "
            f"{_MOST_EXPERTS} experts: fetch the file again"
        )
    for expert in range(tensor.shape[0]):
        yield rule.hf.format(layer=layer, expert=expert), [Piece(tensor, tensor.shape[1:], expert)]
