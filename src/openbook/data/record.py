"""Where a training document came from: enough to make it again, and its licence."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from openbook.tasks.base import Difficulty, Effort

SOURCE = "reasoning-gym"
GENERATOR = "openbook.tasks"
LICENSE = "Apache-2.0"


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One document's origin. Line i of records.jsonl belongs to document i.

    source, version: the package that made the problem. generator: what wrote the worked solution.
    seed: of the problem; with task, difficulty and params it gives the problem again.
    history: task and seed of each answered question that comes before the problem in the same conversation.
    """

    source: str
    version: str
    generator: str
    license: str
    task: str
    difficulty: Difficulty
    effort: Effort
    seed: int
    params: dict[str, Any] = {}
    history: list[tuple[str, int]] = []


def installed_version(package: str) -> str:
    """The installed version of a package, or "unknown" where it runs without being installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
