"""The manifest of a release: every other file with its size and hash, and the recipe they came from."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path, PurePosixPath

from openbook.core.config import Config, convert
from openbook.core.errors import UserError
from openbook.core.files import read_json, sha256_file, write_json

MANIFEST_PATH = PurePosixPath("provenance/manifest.json")
RECIPE_PATH = PurePosixPath("provenance/recipe.toml")
LEDGER_PATH = PurePosixPath("provenance/trace.jsonl")
DATA_PATH = PurePosixPath("provenance/data.json")
ENVIRONMENT_PATH = PurePosixPath("provenance/environment.json")
CHECKPOINTS_PATH = PurePosixPath("provenance/checkpoints")  # <stage>/step-NNNNNNNN/, if they are shipped
FORMAT = 1


class FileEntry(Config, frozen=True, kw_only=True):
    """One file of a release."""

    path: str  # relative to the release folder, with forward slashes
    bytes: int
    sha256: str  # 64 lower-case hex digits


class Manifest(Config, frozen=True, kw_only=True):
    """Every file of a release except the manifest itself, sorted by path."""

    format: int
    openbook: str  # version that wrote the release
    recipe_sha256: str  # `Recipe.hash` of provenance/recipe.toml as that version reads it
    files: tuple[FileEntry, ...]


def list_files(folder: Path) -> list[str]:
    """Paths of all files below `folder` but the manifest, relative with forward slashes, sorted."""
    paths = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())
    return sorted(path for path in paths if path != str(MANIFEST_PATH))


def write_manifest(folder: Path, recipe_sha256: str) -> Manifest:
    """Hash every file of a release and write provenance/manifest.json; the last act of making a release.

    Raises:
        UserError: a file cannot be read, or the manifest not written.
    """
    files = tuple(
        FileEntry(path=path, bytes=(folder / path).stat().st_size, sha256=sha256_file(folder / path))
        for path in list_files(folder)
    )
    manifest = Manifest(format=FORMAT, openbook=version("openbook"), recipe_sha256=recipe_sha256, files=files)
    write_json(folder / MANIFEST_PATH, manifest)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read and validate the manifest of a release.

    Raises:
        UserError: there is none, it is damaged, of another format, or names a path outside the release.
    """
    path = folder / MANIFEST_PATH
    if not path.is_file():
        raise UserError(
            f"{folder} is not a release: it has no {MANIFEST_PATH}; "
            "give a bundled name or a folder that `openbook build` made"
        )
    values = read_json(path, "manifest")
    if isinstance(values, dict) and values.get("format") not in (None, FORMAT):
        raise UserError(
            f"the manifest {path} has format {values['format']}, this openbook reads {FORMAT}: use a newer openbook"
        )
    manifest = convert(values, Manifest, f"the manifest {path}")
    for entry in manifest.files:
        inside = PurePosixPath(entry.path)
        if inside.is_absolute() or ".." in inside.parts:
            raise UserError(f"the manifest {path} names {entry.path}, outside the release: get the release anew")
    return manifest
