"""Adapters as PEFT saves them, written without PEFT, and models with such an adapter merged into their weights."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Matrices of a layer that an adapter may update, in Hugging Face's names.
_MATRIX = re.compile(
    r"(?!visual)(?!.*\.experts\.)(?!.*kv_b_proj)(.*\.(?:\w+_proj|kv_a_proj_with_mqa|c_\w+|shared_expert_gate))\.weight"
)


def module_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of what can be adapted in the folder `model`, by the names of Hugging Face's modules."""
    found = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if match := _MATRIX.fullmatch(name):
            outputs, inputs = tensor.shape if "transformer.h" not in name else tensor.shape[::-1]
            found[match[1]] = (outputs, inputs)
    return found


def save_adapter(
    folder: Path,
    model: Path,
    *,
    rank: int = 4,
    seed: int = 0,
    targets: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """An adapter of random numbers for a model's folder; `settings` are further keys of its configuration.

    targets: the last words of modules' names; None for all that can be adapted.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    shapes = module_shapes(model)
    words = sorted({name.rpartition(".")[2] for name in shapes}) if targets is None else list(targets)
    for name, (outputs, inputs) in shapes.items():
        if name.rpartition(".")[2] not in words:
            continue
        a, b = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
        tensors[f"base_model.model.{name}.lora_A.weight"] = (a / math.sqrt(inputs)).to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = (b / 4).to(dtype)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": words, **settings}
    return write_adapter(folder, config, tensors)


def write_adapter(folder: Path, config: Any, tensors: dict[str, Tensor]) -> Path:
    """A folder with that configuration and those tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def merge(model: Path, adapter: Path, folder: Path) -> Path:
    """The model with W + lora_alpha / r B A in the place of W, computed in float64."""
    shutil.copytree(model, folder)
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights, tensors = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if ".lora_A." in name]:
        target = name.removeprefix("base_model.model.").replace(".lora_A", "")
        a, b = tensors[name].double(), tensors[name.replace(".lora_A", ".lora_B")].double()
        update = b @ a * (config["lora_alpha"] / config["r"])
        weight = weights[target]
        weights[target] = (weight.double() + (update.T if "transformer.h" in target else update)).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
