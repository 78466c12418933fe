"""The manifest names every file but itself, and is read with care."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from openbook.core.errors import UserError
from openbook.release.manifest import MANIFEST_PATH, read_manifest, write_manifest

HASH = "ab" * 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "provenance" / "evals").mkdir(parents=True)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_bytes(b"card")
    (tmp_path / "provenance" / "evals" / "a.jsonl").write_bytes(b"")
    return tmp_path


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST_PATH
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_manifest_names_every_other_file_sorted(folder: Path) -> None:
    write_manifest(folder, HASH)
    manifest = write_manifest(folder, HASH)  # the second time the manifest itself is there
    assert [entry.path for entry in manifest.files] == ["README.md", "model.safetensors", "provenance/evals/a.jsonl"]
    assert manifest.files[1].sha256 == hashlib.sha256(b"weights").hexdigest()
    assert [entry.bytes for entry in manifest.files] == [4, 7, 0]
    assert manifest.recipe_sha256 == HASH
    assert read_manifest(folder) == manifest


def test_a_folder_without_manifest_is_no_release(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a release: it has no provenance/manifest.json; give a bundled name"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has format 2, this openbook reads 1: use a newer openbook"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"files": [{"path": "../x", "bytes": 1, "sha256": HASH}]}, "names ../x, outside the release"),
        ({"files": [{"path": "/x", "bytes": 1, "sha256": HASH}]}, "names /x, outside the release"),
        ({"recipe_sha256": None}, "recipe_sha256: expected `str`, got `null`"),
    ],
)
def test_a_wrong_manifest_is_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    write_manifest(folder, HASH)
    rewrite(folder, **changes)
    with pytest.raises(UserError) as caught:
        read_manifest(folder)
    assert message in str(caught.value)


def test_a_damaged_manifest_is_refused(folder: Path) -> None:
    write_manifest(folder, HASH)
    (folder / MANIFEST_PATH).write_text('{"format": 1,')
    with pytest.raises(UserError, match="is not valid JSON"):
        read_manifest(folder)
