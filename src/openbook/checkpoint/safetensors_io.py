"""Named tensors in a safetensors file, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from openbook.core.errors import UserError, one_line
from openbook.core.files import write_bytes


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` atomically; equal tensors give equal bytes.

    Raises:
        UserError: the file cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One metadata key only: their order in the file is random. Transformers asks for this one.
    write_bytes(path, safetensors.torch.save(plain, metadata={"format": "pt"}))


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read all tensors of a file.

    Raises:
        UserError: the file is missing, cannot be read, is truncated, corrupt or not safetensors.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a safetensors file: give the file inside it")
    try:
        with path.open("rb"):
            pass  # safetensors reports a missing or unreadable file in words of its own
        return safetensors.torch.load_file(path, device=str(device))
    except OSError as error:
        raise one_line(error, f"read the weights {path}") from error
    except SafetensorError as error:
        raise UserError(
            f"the weights {path} are not a whole safetensors file ({_reason(error)}): copy or download the file again"
        ) from error


def _reason(error: SafetensorError) -> str:
    return str(error).splitlines()[0].removeprefix("Error while deserializing header: ")[:120]
