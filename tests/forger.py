"""What someone does who changes a release and covers it up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from openbook.release.manifest import LEDGER_PATH, MANIFEST_PATH, write_manifest
from openbook.train.ledger import Entry, Ledger, read_ledger


def seal(release: Path, recipe_sha256: str | None = None) -> None:
    """Write the manifest anew."""
    manifest = json.loads((release / MANIFEST_PATH).read_text())
    write_manifest(release, recipe_sha256 or manifest["recipe_sha256"])


def forge(release: Path, change: Callable[[list[Entry]], None]) -> None:
    """Change the ledger as a forger would, who makes its links and the manifest anew."""
    path = release / LEDGER_PATH
    entries = read_ledger(path)
    change(entries)
    with Ledger(path, 0) as ledger:
        for entry in entries:
            ledger.append(entry)
    seal(release)


def edit_json(path: Path, **changes: object) -> None:
    """Replace values at the top of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
