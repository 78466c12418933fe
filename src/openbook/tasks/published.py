"""The published test sets, which no training problem may equal.

Every task of the registry, seed 45, 50 items, easy and hard. Making them takes a while, so their digests stand in
published_digests.json, which `python -m openbook.tasks.published` writes anew (after a task is added) and a test
compares.

isomorphic_strings cannot be regenerated as it was published (its generator depends on the process's string hashes);
its digests are those of our own items of the same seeds. Every other task here regenerates exactly.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from openbook.core.files import read_json, write_json
from openbook.tasks.base import DIFFICULTIES, NUM_PUBLISHED_ITEMS, PUBLISHED_SEED

DIGESTS_PATH = Path(__file__).with_name("published_digests.json")
# 64 bits: among a million training problems and three thousand items, a false match has odds below 1 to 10^9.
_NUM_HEX_DIGITS = 16


def is_published(question: str) -> bool:
    """Whether the text, surrounding white space aside, is that of an item of a published test set."""
    return _digest(question) in _known_digests()


def published_digests() -> dict[str, Any]:
    """The contents of published_digests.json, computed from the generators."""
    from openbook.tasks.registry import all_tasks

    tasks = all_tasks()
    digests = {
        _digest(task.generate(PUBLISHED_SEED + item, difficulty).question)
        for task in tasks.values()
        for difficulty in DIFFICULTIES
        for item in range(NUM_PUBLISHED_ITEMS)
    }
    return {
        "seed": PUBLISHED_SEED,
        "items": NUM_PUBLISHED_ITEMS,
        "tasks": sorted(tasks),
        "digests": sorted(digests),
    }


def _digest(question: str) -> str:
    return hashlib.sha256(question.strip().encode()).hexdigest()[:_NUM_HEX_DIGITS]


@cache
def _known_digests() -> frozenset[str]:
    return frozenset(read_json(DIGESTS_PATH, "list of published items")["digests"])


if __name__ == "__main__":
    write_json(DIGESTS_PATH, published_digests())
