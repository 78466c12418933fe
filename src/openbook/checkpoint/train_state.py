"""The whole state of a training run at one step: weights, optimizer, random state, data cursor. Whole or absent."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from openbook.core.config import Config, convert
from openbook.core.errors import UserError
from openbook.core.files import atomic_directory, read_json, sha256_file, write_json

if TYPE_CHECKING:
    from torch import Tensor

_FOLDER = re.compile(r"step-(\d{8})")
_TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")


class TrainPosition(Config, frozen=True, kw_only=True):
    """Where a run stands. `sha256` holds the digest of each tensor file, so that damage is seen before it spreads.

    step: steps done, over all stages. stage_step: steps done in `stage`. cursor: the loader's state.
    best_loss, mean_loss: the divergence watch's memory, in nats a token.
    """

    stage: str
    step: int
    stage_step: int
    cursor: dict[str, int]
    best_loss: float
    mean_loss: float
    sha256: dict[str, str] = msgspec.field(default_factory=dict)


def save_train_state(
    folder: Path,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    position: TrainPosition,
    *,
    keep_all: bool = False,
) -> Path:
    """Write `folder`/step-NNNNNNNN, then remove all but the newest two states, unless `keep_all` is set.

    Raises:
        UserError: the disk is full or the folder cannot be written to; earlier states stay as they are.
    """
    import torch

    from openbook.checkpoint.safetensors_io import save_tensors

    path = state_path(folder, position.step)
    if path.exists():
        shutil.rmtree(path)
    with atomic_directory(path) as partial:
        save_tensors(partial / _TENSOR_FILES[0], weights)
        save_tensors(partial / _TENSOR_FILES[1], {**optimizer, "random_state": torch.get_rng_state()})
        digests = {name: sha256_file(partial / name) for name in _TENSOR_FILES}
        write_json(partial / "state.json", msgspec.structs.replace(position, sha256=digests))
    for old in [] if keep_all else _states(folder)[:-2]:
        shutil.rmtree(old)
    return path


def state_path(folder: Path, step: int) -> Path:
    """Where under `folder` the state after `step` steps is."""
    return folder / f"step-{step:08}"


def latest_train_state(folder: Path) -> Path | None:
    """The newest state under `folder`, or None."""
    states = _states(folder)
    return states[-1] if states else None


def read_position(path: Path) -> TrainPosition:
    """Where the state in folder `path` stands, without its tensors.

    Raises:
        UserError: state.json is missing or damaged.
    """
    return convert(read_json(path / "state.json", "training state"), TrainPosition, f"the training state {path}")


def load_train_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], TrainPosition]:
    """Weights, optimizer state and position of one saved state; sets torch's random state.

    Raises:
        UserError: a file is missing or damaged; the message names it.
    """
    import torch

    from openbook.checkpoint.safetensors_io import load_tensors

    position = read_position(path)
    for name in _TENSOR_FILES:
        if sha256_file(path / name) != position.sha256.get(name):
            raise UserError(
                f"{path / name} is not the file that was saved (its SHA-256 differs): remove the folder {path} and "
                "resume from the state before it"
            )
    weights, optimizer = (load_tensors(path / name) for name in _TENSOR_FILES)
    torch.set_rng_state(optimizer.pop("random_state"))
    return weights, optimizer, position


def _states(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _FOLDER.fullmatch(path.name))
