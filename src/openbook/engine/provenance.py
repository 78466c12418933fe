"""What a release says about itself that a user should hear before talking to it."""

from __future__ import annotations

import tomllib
from pathlib import Path

from openbook.core.errors import UserError
from openbook.core.files import read_bytes

RECIPE_FILE = "provenance/recipe.toml"


def is_openbook_release(folder: Path) -> bool:
    """Whether the model in `folder` was built here: its recipe lies beside it."""
    return (folder / RECIPE_FILE).is_file()


def read_tasks(folder: Path) -> list[str]:
    """Names of the tasks a release was trained on, in the order of first mention; [] for a model that is not ours.

    Raises:
        UserError: the recipe in the release is damaged.
    """
    if not is_openbook_release(folder):
        return []
    path = folder / RECIPE_FILE
    # Read by hand, not as a Recipe: that type lives with training, and a chat must not import it.
    try:
        stages = tomllib.loads(read_bytes(path, "recipe").decode())["stages"]
        tasks = [str(entry["task"]) for stage in stages for entry in stage["mixture"]]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"the recipe {path} is damaged ({type(error).__name__}: {error}): restore the release from its source"
        ) from error
    return list(dict.fromkeys(tasks))
