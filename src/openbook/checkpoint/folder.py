"""Models from disk and back: a Hugging Face folder, read and written, or a GGUF file, read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from openbook.checkpoint.key_convert import PLAIN_DTYPES, from_hf, to_hf
from openbook.checkpoint.key_map import KeyMap, spell_out
from openbook.checkpoint.key_maps import KEY_MAPS
from openbook.checkpoint.key_maps.deepseek import prediction_head_table
from openbook.checkpoint.model_files import CONFIG_FILE, WEIGHTS_FILE
from openbook.checkpoint.model_source import ModelSource, open_model
from openbook.checkpoint.safetensors_io import save_tensors
from openbook.core.errors import UserError
from openbook.core.files import write_json
from openbook.models.base import CausalModel
from openbook.models.config import ModelConfig
from openbook.models.configs.deepseek import DeepseekV3Config
from openbook.models.deepseek import DeepseekV3
from openbook.models.deepseek_mtp import PredictionHead
from openbook.models.registry import build_model, config_to_hf
from openbook.ops.base import Ops


def load_config(path: Path) -> ModelConfig:
    """The shape of the model in a folder or GGUF file.

    Raises:
        UserError: a file is missing or damaged, or describes a model that is not implemented.
    """
    return open_model(path).config


def load_model(
    source: Path | ModelSource, ops: Ops, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CausalModel:
    """Load the model in a folder or GGUF file; its weights are converted to `dtype`.

    Raises:
        UserError: a file is missing or damaged, or weights and configuration do not fit.
    """
    if isinstance(source, Path):
        source = open_model(source)
    config, table, where = source.config, KEY_MAPS[source.config.model_type], f"the model {source.path}"
    model = build_model(config, ops, device="meta")
    _fill(model, source, table, where, device, dtype)
    return model


def load_prediction_head(source: Path | ModelSource, model: DeepseekV3) -> PredictionHead:
    """Load what drafts for `model` from its files, onto its device and in its dtype.

    Raises:
        UserError: the files carry no such head, or a damaged one.
    """
    if isinstance(source, Path):
        source = open_model(source)
    config = model.config
    assert isinstance(config, DeepseekV3Config)
    where = f"the prediction head of {source.path}"
    if not config.num_nextn_predict_layers:
        raise UserError(f"{where}: num_nextn_predict_layers is 0, expected 1 or more: the model has none to draft with")
    with torch.device("meta"):
        head = PredictionHead(model)
    like = model.output_weight
    _fill(head, source, prediction_head_table(config), where, like.device, like.dtype)
    return head


def _fill(
    module: nn.Module, source: ModelSource, table: KeyMap, where: str, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Give the module, which has no memory yet, its weights."""
    config = source.config
    tensors = from_hf(source.tensors(dtype, device), config, table, where, dtype=dtype, device=device)
    wide = {entry.ours for entry in spell_out(table, config) if entry.is_float32}
    for name, expected in module.state_dict().items():
        given = tensors[name]
        if given.shape != expected.shape:
            raise UserError(
                f"{where}: {name} has shape {list(given.shape)}, config.json says "
                f"{list(expected.shape)}: weights and config.json do not belong together, fetch both again"
            )
        # Plain weights were converted; what is packed is what it is.
        needed = dtype if expected.dtype in PLAIN_DTYPES and name not in wide else expected.dtype
        if given.dtype != needed:
            raise UserError(
                f"{where}: {name} holds {_name(given.dtype)}, expected {_name(needed)}: weights and config.json do not "
                "belong together, fetch both again"
            )
    # assign: the tensors that were read become the parameters, with no second copy.
    module.load_state_dict(tensors, assign=True)


def save_model(model: CausalModel, path: Path) -> None:
    """Write config.json and model.safetensors into the folder `path`, which is made if need be.

    Raises:
        UserError: they cannot be written.
    """
    dtype = _name(next(model.parameters()).dtype)
    save_tensors(path / WEIGHTS_FILE, to_hf(model.state_dict(), model.config, KEY_MAPS[model.config.model_type]))
    write_json(path / CONFIG_FILE, {**config_to_hf(model.config), "dtype": dtype})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
