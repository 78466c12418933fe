"""Packing: documents of unlike lengths into rows of equal length, best fit first, with little padding."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from openbook.core.config import Config


class DataConfig(Config, frozen=True, kw_only=True):
    """How documents become rows and files.

    Attributes:
        row_tokens: tokens of one row, padding included; longer documents are refused.
        look_ahead: documents among which the packer may choose.
        shard_rows: rows of one file.
        history_share: share of the documents that are conversations: one or two answered questions come before the one
            that is worked out.
    """

    row_tokens: int = 256
    look_ahead: int = 1024
    shard_rows: int = 8192
    history_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("row_tokens", "look_ahead", "shard_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if not 0 <= self.history_share <= 1:
            raise ValueError(f"history_share is {self.history_share}, expected 0 to 1")


class Document(NamedTuple):
    """One tokenized document. ids: [tokens]; loss_mask: uint8 [tokens], 1 where a token is trained on."""

    number: int  # index in the stage
    ids: NDArray[np.generic]
    loss_mask: NDArray[np.uint8]


def pack(documents: Iterable[Document], row_tokens: int, look_ahead: int) -> Iterator[list[Document]]:
    """Rows of documents, at most `row_tokens` tokens each; a function of the documents' order alone.

    A row begins with the document that has waited longest, so that none waits for ever, and is filled with the longest
    that still fits among `look_ahead` waiting ones.
    """
    source = iter(documents)
    waiting: OrderedDict[int, Document] = OrderedDict()
    by_length: defaultdict[int, deque[int]] = defaultdict(deque)
    lengths = 0  # bit n is set if a document of n tokens waits
    while True:
        while len(waiting) < look_ahead and (document := next(source, None)) is not None:
            length = len(document.ids)
            waiting[document.number] = document
            by_length[length].append(document.number)
            lengths |= 1 << length
        if not waiting:
            return
        row: list[Document] = []
        free = row_tokens
        fitting = len(next(iter(waiting.values())).ids)
        while fitting:
            # Within one length the order is that of arrival, so the first document is also the first of its length.
            queue = by_length[fitting]
            row.append(waiting.pop(queue.popleft()))
            if not queue:
                lengths &= ~(1 << fitting)
            free -= fitting
            # The highest set bit among those up to `free`; none leaves 0, as no document is empty.
            fitting = max(0, (lengths & ((2 << free) - 1)).bit_length() - 1)
        yield row


class Rows(NamedTuple):
    """Packed rows as arrays [rows, row_tokens].

    tokens: uint16 or uint32. loss_mask: uint8. documents: int32, a document's index in the stage, -1 for padding.
    """

    tokens: NDArray[np.generic]
    loss_mask: NDArray[np.uint8]
    documents: NDArray[np.int32]


def to_arrays(rows: list[list[Document]], row_tokens: int, pad_id: int, dtype: type[np.generic]) -> Rows:
    """Lay rows out as arrays; what is left at the end of a row is padding."""
    shape = (len(rows), row_tokens)
    arrays = Rows(np.full(shape, pad_id, dtype), np.zeros(shape, np.uint8), np.full(shape, -1, np.int32))
    for number, row in enumerate(rows):
        start = 0
        for document in row:
            end = start + len(document.ids)
            arrays.tokens[number, start:end] = document.ids
            arrays.loss_mask[number, start:end] = document.loss_mask
            arrays.documents[number, start:end] = document.number
            start = end
    return arrays
