"""Integrity: is every file of a release the one its manifest names, and do the weights fit the configuration?"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Literal

import msgspec

from openbook.checkpoint.locate import bundled_names, locate
from openbook.core.errors import UserError
from openbook.core.files import read_json, sha256_bytes, sha256_file
from openbook.release.manifest import (
    MANIFEST_PATH,
    RECIPE_PATH,
    FileEntry,
    Manifest,
    list_files,
    read_manifest,
)

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
DIGITS = 12  # hex digits of a hash in a message

# Said with every result: a verdict covers what was checked and nothing else.
NOT_CHECKED = (
    "who made the release (the manifest is not signed)",
    "that the data comes out of its generators again",
    "that the recipe leads to these weights (build it again and compare)",
)


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One file that is not what the manifest or the configuration says."""

    path: str
    kind: Literal["missing", "added", "changed", "invalid"]
    detail: str

    def __str__(self) -> str:
        return f"{self.kind:<8} {self.path}: {self.detail}"


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """What was checked and what differs. `verdict` is "INTEGRITY" or "DIFFERS"."""

    release: str
    verdict: Literal["INTEGRITY", "DIFFERS"]
    manifest_sha256: str
    recipe_sha256: str
    num_files: int
    num_bytes: int
    num_parameters: int  # as the header of the weights says; 0 if it cannot be read
    differences: tuple[Difference, ...]
    not_checked: tuple[str, ...]


def verify(release: str | Path) -> Verification:
    """Check a release: hashes of all files, the recipe's hash, the header of the weights against config.json.

    Args:
        release: a bundled name, or a release folder.

    Raises:
        UserError: there is no such release, or a file cannot be read.
    """
    # A release that lost its config.json is no model any more, but it is still a release to be checked.
    is_folder = str(release) not in bundled_names() and Path(release).is_dir()
    folder = Path(release) if is_folder else locate(release)
    manifest = read_manifest(folder)
    differences = _compare_files(folder, manifest)
    not_checked = list(NOT_CHECKED)
    if manifest.openbook == version("openbook"):
        differences += _check_recipe(folder, manifest)
    else:
        # Another version fills in other defaults, so the hash it took of the recipe cannot be taken again here.
        not_checked.append(f"the hash of the recipe (openbook {manifest.openbook} took it)")
    shapes, invalid = _read_shapes(folder / WEIGHTS)
    differences += invalid
    if shapes:
        differences += _check_shapes(folder, shapes)
    return Verification(
        release=str(folder),
        verdict="DIFFERS" if differences else "INTEGRITY",
        manifest_sha256=sha256_bytes((folder / MANIFEST_PATH).read_bytes()),
        recipe_sha256=manifest.recipe_sha256,
        num_files=len(manifest.files),
        num_bytes=sum(entry.bytes for entry in manifest.files),
        num_parameters=sum(_product(shape) for shape in shapes.values()),
        differences=tuple(differences),
        not_checked=tuple(not_checked),
    )


def _compare_files(folder: Path, manifest: Manifest) -> list[Difference]:
    expected = {entry.path: entry for entry in manifest.files}
    present = set(list_files(folder))
    found = [_compare_file(folder, expected[path]) for path in sorted(expected) if path in present]
    missing = [
        Difference(path=path, kind="missing", detail=f"expected {expected[path].bytes} bytes")
        for path in sorted(set(expected) - present)
    ]
    added = [
        Difference(path=path, kind="added", detail="the manifest does not name it")
        for path in sorted(present - set(expected))
    ]
    return [difference for difference in found if difference] + missing + added


def _compare_file(folder: Path, entry: FileEntry) -> Difference | None:
    actual = sha256_file(folder / entry.path)
    if actual == entry.sha256:
        return None
    size = (folder / entry.path).stat().st_size
    sizes = "" if size == entry.bytes else f" ({entry.bytes} bytes expected, {size} found)"
    detail = f"sha256 expected {entry.sha256[:DIGITS]}, found {actual[:DIGITS]}{sizes}"
    return Difference(path=entry.path, kind="changed", detail=detail)


def _check_recipe(folder: Path, manifest: Manifest) -> list[Difference]:
    """The recipe in the release against the hash that identifies the model."""
    from openbook.train.recipe import load_recipe

    if not (folder / RECIPE_PATH).is_file():
        return []  # the comparison of files says so
    try:
        actual = load_recipe(folder / RECIPE_PATH).hash
    except UserError as error:
        return [Difference(path=str(RECIPE_PATH), kind="invalid", detail=str(error))]
    if actual == manifest.recipe_sha256:
        return []
    detail = f"recipe hash expected {manifest.recipe_sha256[:DIGITS]}, found {actual[:DIGITS]}"
    return [Difference(path=str(RECIPE_PATH), kind="invalid", detail=detail)]


def _read_shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], list[Difference]]:
    """Names and shapes from the header of a safetensors file; the library checks header, offsets and file size."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return {}, []
    try:
        with safe_open(path, framework="numpy") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}, []  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        return {}, [Difference(path=path.name, kind="invalid", detail=f"not a whole safetensors file: {error}")]


def _check_shapes(folder: Path, shapes: dict[str, tuple[int, ...]]) -> list[Difference]:
    """Names and shapes of the weights against those of the model that config.json describes."""
    if not (folder / CONFIG).is_file():
        return []
    try:
        expected = _expected_shapes(folder)
    except UserError as error:
        return [Difference(path=CONFIG, kind="invalid", detail=str(error))]
    problems = [f"{name} is missing" for name in sorted(set(expected) - set(shapes))]
    problems += [f"{name} belongs to no part of the model" for name in sorted(set(shapes) - set(expected))]
    problems += [
        f"{name} has shape {list(shapes[name])}, config.json asks for {list(expected[name])}"
        for name in sorted(set(shapes) & set(expected))
        if shapes[name] != expected[name]
    ]
    return [Difference(path=WEIGHTS, kind="invalid", detail=problem) for problem in problems]


def _expected_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of the model in config.json, without allocating it."""
    from openbook.checkpoint.key_convert import to_hf
    from openbook.checkpoint.key_maps import KEY_MAPS
    from openbook.models.registry import build_model, config_from_hf
    from openbook.ops.torch_ops import TorchOps

    config = config_from_hf(read_json(folder / CONFIG, "model configuration"), str(folder / CONFIG))
    model = build_model(config, TorchOps(), device="meta")
    table = KEY_MAPS[config.model_type]
    return {name: tuple(tensor.shape) for name, tensor in to_hf(model.state_dict(), config, table).items()}


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
