"""A release to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def release(made_release: Path, tmp_path: Path) -> Path:
    """A copy of a good release."""
    return Path(shutil.copytree(made_release, tmp_path / "release"))
