"""Tests here may choose an instruction set and a number of threads: the next test has those from before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from exact_paths import kept_path


@pytest.fixture(autouse=True)
def _kept_path() -> Iterator[None]:
    with kept_path():
        yield
