"""From what the user calls a model to its folder."""

from __future__ import annotations

from pathlib import Path

from openbook.core.errors import UserError, unknown_name


def releases_dir() -> Path:
    """The folder of the models that ship inside the package."""
    return Path(__file__).resolve().parent.parent / "releases"


def bundled_names() -> list[str]:
    """Names of the bundled models, sorted."""
    folder = releases_dir()
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if (entry / "config.json").is_file())


def locate(model: str | Path) -> Path:
    """The folder of a bundled name, a release folder or a Hugging Face folder.

    A bundled name wins over a folder of the same name; write `./nano` for the folder.

    Raises:
        UserError: there is no such model (with the nearest bundled name), or it is of a kind that is not supported.
    """
    name = str(model)
    names = bundled_names()
    if name in names:
        return releases_dir() / name
    path = Path(name).expanduser()
    known = f"bundled models: {', '.join(names) or 'none'}; or give the path of a model folder"
    if not name.strip():
        raise UserError(f"the model's name is empty: {known}")
    if path.suffix.lower() == ".gguf":
        raise UserError(
            f"the model {name} is a GGUF file, which is not supported yet: give the folder of a model with config.json"
        )
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"the folder {name} has no config.json, so it is no model: give a release or Hugging Face folder"
            )
        return path
    if path.is_file():
        raise UserError(f"the model {name} is a file: expected a folder with config.json and model.safetensors")
    if _is_hub_id(name):
        raise UserError(
            f"there is no folder {name}, and loading hub ids is not supported yet: download the model, then give its "
            "folder"
        )
    if "/" in name or name.startswith((".", "~")):
        raise UserError(f"there is no folder {name}: check the path; {known}")
    raise unknown_name("model", name, names, known)


def _is_hub_id(name: str) -> bool:
    """Whether a name reads like `owner/model` on the Hugging Face hub."""
    owner, _, repo = name.partition("/")
    return bool(owner and repo) and "/" not in repo and owner[0] not in ".~"
