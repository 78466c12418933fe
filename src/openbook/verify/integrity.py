"""Integrity: is every file of a release the one its manifest names, and do the weights fit the configuration?"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import msgspec

from openbook.core.errors import UserError
from openbook.core.files import read_json, sha256_file
from openbook.release.manifest import (
    ENVIRONMENT_PATH,
    RECIPE_PATH,
    FileEntry,
    Manifest,
    list_files,
    read_manifest,
)
from openbook.train.ledger import Entry
from openbook.train.recipe import Recipe, load_recipe
from openbook.verify.difference import DIGITS, Difference
from openbook.verify.ledger import NO_STATES, check_ledger, check_weights, has_states

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
NO_SIGNATURE = "who made the release (the manifest is not signed)"


class Integrity(msgspec.Struct, frozen=True, kw_only=True):
    """What the files of a release say without anything being run again.

    recipe: None if it cannot be read. entries: of the ledger; [] if it cannot be read. num_parameters: as the header of
    the weights says; 0 if it cannot be read. not_checked: what these files do not let one check.
    """

    manifest: Manifest
    recipe: Recipe | None
    entries: list[Entry]
    num_parameters: int
    differences: list[Difference]
    not_checked: list[str]


def check_integrity(folder: Path) -> Integrity:
    """Check a release: hashes of all files, the recipe's hash, the weights against config.json, the ledger.

    Raises:
        UserError: the folder is not a release, or a file cannot be read.
    """
    manifest = read_manifest(folder)
    differences = _compare_files(folder, manifest)
    not_checked = [NO_SIGNATURE]
    recipe = None
    if manifest.openbook == version("openbook"):
        recipe, invalid = _check_recipe(folder, manifest)
        differences += invalid + _check_environment(folder, manifest)
    else:
        # Another version fills in other defaults, so the hash it took of the recipe cannot be taken again here.
        not_checked.append(f"the hash of the recipe (openbook {manifest.openbook} took it)")
    shapes, invalid = _read_shapes(folder / WEIGHTS)
    if shapes:
        invalid += _check_shapes(folder, shapes)
    differences += invalid
    ledger_differences, entries = check_ledger(folder, recipe)
    differences += ledger_differences
    if entries and not has_states(entries):
        not_checked.append(f"the steps of the training: {NO_STATES}")
    if not differences:
        differences += check_weights(folder, entries)
    return Integrity(
        manifest=manifest,
        recipe=recipe,
        entries=entries,
        num_parameters=sum(_product(shape) for shape in shapes.values()),
        differences=differences,
        not_checked=not_checked,
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


def _check_recipe(folder: Path, manifest: Manifest) -> tuple[Recipe | None, list[Difference]]:
    """The recipe in the release against the hash that identifies the model."""
    if not (folder / RECIPE_PATH).is_file():
        return None, []  # the comparison of files says so
    try:
        recipe = load_recipe(folder / RECIPE_PATH)
    except UserError as error:
        return None, [Difference(path=str(RECIPE_PATH), kind="invalid", detail=str(error))]
    if recipe.hash == manifest.recipe_sha256:
        return recipe, []
    detail = f"recipe hash expected {manifest.recipe_sha256[:DIGITS]}, found {recipe.hash[:DIGITS]}"
    return None, [Difference(path=str(RECIPE_PATH), kind="invalid", detail=detail)]


def _check_environment(folder: Path, manifest: Manifest) -> list[Difference]:
    """The record of the run names the recipe that it was a run of."""
    path = folder / ENVIRONMENT_PATH
    if not path.is_file():
        return []
    try:
        values = read_json(path, "record of the run")
    except UserError as error:
        return [Difference(path=str(ENVIRONMENT_PATH), kind="invalid", detail=str(error))]
    actual = str(values.get("recipe") if isinstance(values, dict) else None)
    if actual == manifest.recipe_sha256:
        return []
    detail = f"a run of recipe {actual[:DIGITS]}, the manifest says {manifest.recipe_sha256[:DIGITS]}"
    return [Difference(path=str(ENVIRONMENT_PATH), kind="invalid", detail=detail)]


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
