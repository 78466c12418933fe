"""Batches of packed rows, in an order that a seed decides, from exactly where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openbook.core.errors import UserError
from openbook.core.seeding import derive_seed
from openbook.data.pack import Rows
from openbook.data.shards import map_shard, read_manifest, verify

NO_TARGET = -1


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows to train on; all arrays int64 [B, T], B rows of T tokens.

    Attributes:
        ids: input tokens.
        targets: the next token of the same document; -1 where the loss mask of that token is 0, at a document's end
            and in padding.
        positions: from 0 in each document; 0 in padding.
        documents: index of the document in the stage; -1 in padding.
        digest: SHA-256 of the four arrays, 64 hex digits.
        first_document: index of the first row's first document.
    """

    ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    positions: NDArray[np.int64]
    documents: NDArray[np.int64]
    digest: str
    first_document: int


class ShardLoader:
    """Reads a stage's data folder, epoch after epoch, each in a new order of rows.

    Args:
        folder: what `corpus.write_stage_data` wrote; its files are checked against the manifest once, here.
        rows_per_batch: B.
        seed: of the order.

    Raises:
        UserError: a file is missing, truncated or damaged.
    """

    def __init__(self, folder: Path | str, rows_per_batch: int, seed: int) -> None:
        self.folder, self.rows_per_batch, self.seed = Path(folder), rows_per_batch, seed
        self.manifest = read_manifest(self.folder)
        verify(self.folder, self.manifest)
        self._shards = [map_shard(self.folder / file.path) for file in self.manifest.shards]
        self._first_rows = np.cumsum([0, *(file.rows for file in self.manifest.shards)])
        self.num_rows = int(self._first_rows[-1])
        self._epoch, self._position = -1, 0
        self._go(0, 0)

    def next_batch(self) -> Batch:
        """The next `rows_per_batch` rows; a batch may hold the end of one epoch and the beginning of the next."""
        rows = []
        for _ in range(self.rows_per_batch):
            rows.append(self._row(self._order[self._position]))
            self._go(self._epoch, self._position + 1)
        arrays = Rows(*(np.stack(parts) for parts in zip(*rows, strict=True)))
        return _make_batch(arrays)

    def state(self) -> dict[str, int]:
        """Where the next batch begins: epoch, row within the epoch's order, index of that row's first document."""
        return {"epoch": self._epoch, "row": self._position, "document": self._first_document()}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue from a `state()`; an empty one is the beginning.

        Raises:
            UserError: the state does not belong to this data.
        """
        if not state:
            self._go(0, 0)
            return
        epoch, row = state["epoch"], state["row"]
        if epoch < 0 or not 0 <= row < self.num_rows:
            raise UserError(f"the checkpoint stands at row {row} and {self.folder} has {self.num_rows}: {_OTHER_DATA}")
        self._go(epoch, row)
        found = self._first_document()
        if found != state["document"]:
            raise UserError(
                f"the checkpoint stands at document {state['document']} and {self.folder} has document {found} there: "
                f"{_OTHER_DATA}"
            )

    def _go(self, epoch: int, position: int) -> None:
        if position == self.num_rows:
            epoch, position = epoch + 1, 0
        if epoch != self._epoch:
            # Sorting raw draws, as numpy promises the same ones in every version, which it does not for `permutation`.
            draws = np.random.PCG64(derive_seed(self.seed, "epoch", epoch)).random_raw(self.num_rows)
            self._order = np.argsort(draws, kind="stable")
        self._epoch, self._position = epoch, position

    def _row(self, number: int) -> Rows:
        shard = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        inside = number - self._first_rows[shard]
        return Rows(*(array[inside] for array in self._shards[shard]))

    def _first_document(self) -> int:
        return int(self._row(self._order[self._position]).documents[0])


_OTHER_DATA = "the data is not what the checkpoint was trained on; restore it, or build into a new folder"


def _make_batch(rows: Rows) -> Batch:
    """Inputs and targets of rows [B, T]."""
    ids, documents = rows.tokens.astype(np.int64), rows.documents.astype(np.int64)
    num_tokens = ids.shape[1]
    targets = np.full_like(ids, NO_TARGET)
    is_target = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0) & (rows.loss_mask[:, 1:] == 1)
    targets[:, :-1][is_target] = ids[:, 1:][is_target]
    index = np.arange(num_tokens)
    starts = np.zeros_like(ids)
    starts[:, 1:] = np.where(documents[:, 1:] != documents[:, :-1], index[1:], 0)
    positions = np.where(documents >= 0, index - np.maximum.accumulate(starts, axis=1), 0)
    digest = hashlib.sha256()
    for array in (ids, targets, positions, documents):
        digest.update(array.tobytes())
    return Batch(
        ids=ids,
        targets=targets,
        positions=positions,
        documents=documents,
        digest=digest.hexdigest(),
        first_document=int(documents[0, 0]),
    )
