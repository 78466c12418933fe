"""Families by their `model_type`, and the two-way reading of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from openbook.core.config import convert
from openbook.core.errors import UserError, unknown_name
from openbook.models.base import CausalModel
from openbook.models.config import ModelConfig
from openbook.models.qwen3 import Qwen3
from openbook.ops.base import Ops


@dataclass(frozen=True)
class Family:
    """One architecture: our class, its name in Transformers, and the config.json keys whose one value we implement."""

    model: type[CausalModel]
    architecture: str
    fixed: Mapping[str, Any]


FAMILIES: dict[str, Family] = {
    "qwen3": Family(
        model=Qwen3,
        architecture="Qwen3ForCausalLM",
        fixed={"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False},
    )
}

# Keys that do not touch the arithmetic: who wrote the file, token ids (the tokenizer knows them), what a cache is for.
_WITHOUT_MEANING = frozenset(
    """
    architectures dtype torch_dtype transformers_version _name_or_path use_cache bos_token_id eos_token_id pad_token_id
    max_window_layers sliding_window chunk_size_feed_forward id2label label2id is_encoder_decoder output_attentions
    output_hidden_states problem_type return_dict
    """.split()  # noqa: SIM905
)


def build_model(config: ModelConfig, ops: Ops, device: torch.device | str = "cpu") -> CausalModel:
    """A model of that shape; its weights are uninitialised: call `init_weights` or load a checkpoint.

    On the device "meta" the weights have shapes and no memory.

    Raises:
        UserError: the family is not known.
    """
    family = require_family(config.model_type, "the model configuration")
    with torch.device("meta"):
        model = family.model(config, ops)
    return model if str(device) == "meta" else model.to_empty(device=device)


def config_from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Read the content of a Hugging Face config.json; `where` names the file in messages.

    Raises:
        UserError: an unknown family, a key whose value we do not implement, an unknown or missing key.
    """
    values = dict(values)
    if "model_type" not in values:
        raise UserError(f"{where}: the key model_type is missing: add it (known: {', '.join(sorted(FAMILIES))})")
    family = require_family(str(values["model_type"]), where)
    for key, expected in family.fixed.items():
        if (given := values.pop(key, expected)) != expected:
            raise UserError(f"{where}: {key} is {given!r}, only {expected!r} is implemented: use another model")
    layer_types = values.pop("layer_types", None) or []
    if not isinstance(layer_types, list):
        raise UserError(f"{where}: layer_types is {layer_types!r}, expected a list: fetch the file again")
    if others := [kind for kind in layer_types if kind != "full_attention"]:
        raise UserError(f"{where}: layer_types has {others[0]!r}, only 'full_attention' is implemented: use another")
    rope = values.pop("rope_parameters", None) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters is {rope!r}, expected an object: fetch the file again")
    if values.pop("rope_scaling", None) is not None or rope.get("rope_type", "default") != "default":
        raise UserError(f"{where}: scaled rotary embedding is not implemented: use a model without rope_scaling")
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    if values.get("num_key_value_heads", 0) is None:
        values["num_key_value_heads"] = values.get("num_attention_heads")
    return convert({key: value for key, value in values.items() if key not in _WITHOUT_MEANING}, ModelConfig, where)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json that Transformers reads for `config`."""
    family = require_family(config.model_type, "the model configuration")
    values = msgspec.structs.asdict(config)
    theta = values.pop("rope_theta")
    # Both spellings: Transformers from version 5 reads rope_parameters, older readers rope_theta.
    rope = {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    return {"architectures": [family.architecture], **values, **rope, **family.fixed}


def require_family(model_type: str, where: str) -> Family:
    """The family of that name; `where` names what asked for it in messages.

    Raises:
        UserError: the family is not known.
    """
    if model_type not in FAMILIES:
        error = unknown_name("model_type", model_type, FAMILIES, f"known: {', '.join(sorted(FAMILIES))}")
        raise UserError(f"{where}: {error}")
    return FAMILIES[model_type]
