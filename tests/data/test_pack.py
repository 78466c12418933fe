from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from openbook.data.pack import Document, pack, to_arrays


def make(lengths: list[int]) -> list[Document]:
    return [
        Document(number, np.full(length, number + 1, np.uint16), np.ones(length, np.uint8))
        for number, length in enumerate(lengths)
    ]


@given(st.lists(st.integers(1, 64), max_size=80), st.integers(1, 20))
def test_every_document_stands_in_one_row_that_holds_it(lengths: list[int], look_ahead: int) -> None:
    rows = list(pack(make(lengths), 64, look_ahead))
    assert sorted(document.number for row in rows for document in row) == list(range(len(lengths)))
    assert all(0 < sum(len(document.ids) for document in row) <= 64 for row in rows)


@given(st.lists(st.integers(1, 64), max_size=80), st.integers(1, 20))
def test_no_document_waits_for_ever(lengths: list[int], look_ahead: int) -> None:
    for number, row in enumerate(pack(make(lengths), 64, look_ahead)):
        assert min(document.number for document in row) >= 0
        # Each row takes at least the oldest, so row n still finds document n or has seen it go.
        assert max(document.number for document in row) <= number * 64 + look_ahead + 64
        assert row[0].number <= number * 64


def test_a_mixed_corpus_has_little_padding() -> None:
    generator = random.Random(1)
    lengths = [generator.choice([17, 40, 90, 150, 230]) + generator.randrange(20) for _ in range(3000)]
    rows = list(pack(make(lengths), 256, 512))
    assert 1 - sum(lengths) / (256 * len(rows)) <= 0.05


def test_the_longest_that_fits_is_taken_and_within_a_length_the_oldest() -> None:
    rows = list(pack(make([5, 3, 4, 4, 6, 1]), 10, 6))
    assert [[document.number for document in row] for row in rows] == [[0, 2, 5], [1, 4], [3]]


def test_rows_as_arrays() -> None:
    rows = to_arrays(list(pack(make([3, 2]), 6, 4)), 6, pad_id=9, dtype=np.uint16)
    assert rows.tokens.tolist() == [[1, 1, 1, 2, 2, 9]]
    assert rows.loss_mask.tolist() == [[1, 1, 1, 1, 1, 0]]
    assert rows.documents.tolist() == [[0, 0, 0, 1, 1, -1]]
