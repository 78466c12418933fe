"""Parts of config.json that several families write alike, to our fields and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from openbook.core.config import convert
from openbook.core.errors import UserError
from openbook.models.config import MOST_LAYERS, DecoderConfig, ModelConfig, RopeScaling

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# Keys that do not touch the arithmetic: who wrote the file, token ids (the tokenizer knows them), what a cache is for.
WITHOUT_MEANING = frozenset(
    """
    architectures dtype torch_dtype transformers_version _name_or_path use_cache bos_token_id eos_token_id pad_token_id
    chunk_size_feed_forward id2label label2id is_encoder_decoder output_attentions output_hidden_states problem_type
    return_dict
    """.split()  # noqa: SIM905
)


def take_fixed(values: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` without the keys of `fixed`, whose one value we implement.

    Raises:
        UserError: another value.
    """
    for key, expected in fixed.items():
        if (given := values.get(key, expected)) != expected:
            raise UserError(f"{where}: {key} is {given!r}, only {expected!r} is implemented: use another model")
    return {key: value for key, value in values.items() if key not in fixed}


def read_rope(values: dict[str, Any], where: str) -> dict[str, Any]:
    """`rope_parameters` (from Transformers 5 on) or `rope_scaling` and `rope_theta` (before) to our fields.

    Raises:
        UserError: a kind of scaling, or a part of it, that we do not implement.
    """
    values = dict(values)
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        given = values.pop(key, None) or {}
        if not isinstance(given, dict):
            raise UserError(f"{where}: {key} is {given!r}, expected an object: fetch the file again")
        rope |= given
    rope = {key: value for key, value in rope.items() if value is not None}
    # "type" is what rope_type was called before.
    spelled = [rope.pop(key, "default") for key in ("rope_type", "type")]
    kind = next((one for one in spelled if one != "default"), "default")
    if kind not in _ROPE_TYPES:
        raise UserError(
            f"{where}: rope_type is {kind!r}, only {', '.join(_ROPE_TYPES)} are implemented: use another model"
        )
    if (share := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is {share!r}, only 1.0 is implemented: use another model")
    if (theta := rope.pop("rope_theta", values.get("rope_theta"))) is not None:
        values["rope_theta"] = theta
    original = values.pop("original_max_position_embeddings", None) or values.get("max_position_embeddings")
    if kind != "default":
        if kind != "linear":
            rope.setdefault("original_max_position_embeddings", original)
        values["rope_scaling"] = convert({**rope, "rope_type": kind}, RopeScaling, f"{where}: rope_parameters")
    return values


def write_rope(values: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The reverse of `read_rope`, in both spellings: older readers know rope_theta and rope_scaling."""
    assert isinstance(config, DecoderConfig)
    values = {key: value for key, value in values.items() if key not in ("rope_theta", "rope_scaling")}
    if config.layer_types:
        values["layer_types"] = list(config.layer_types)
    else:
        del values["layer_types"]
        if values["sliding_window"] is None:
            del values["sliding_window"]
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = msgspec.to_builtins(config.rope_scaling)
        used = _USED_KEYS[config.rope_scaling.rope_type]
        parameters |= {key: value for key, value in scaling.items() if key in used and value is not None}
        values["rope_scaling"] = parameters
    return {**values, "rope_theta": config.rope_theta, "rope_parameters": parameters}


_USED_KEYS = {
    "linear": {"rope_type", "factor"},
    "llama3": {"rope_type", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": set(RopeScaling.__struct_fields__) - {"low_freq_factor", "high_freq_factor"},
}


def read_qwen_layers(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Which layers have a sliding window, as Qwen writes it: from `max_window_layers` on, if it is switched on."""
    values = dict(values)
    is_on = values.pop("use_sliding_window", False)
    first = values.pop("max_window_layers", 0)
    window, kinds = values.pop("sliding_window", None), values.pop("layer_types", None)
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise UserError(f"{where}: layer_types is {kinds!r}, expected a list of words: fetch the file again")
    layers = values.get("num_hidden_layers")
    if not is_on or window is None:
        if kinds and "sliding_attention" in kinds:
            raise UserError(
                f"{where}: layer_types has 'sliding_attention' but sliding_window is off: fetch the file again"
            )
        return values if kinds is None or set(kinds) <= {"full_attention"} else {**values, "layer_types": kinds}
    # A number of layers that cannot be is refused later, by its own line.
    if kinds is None and isinstance(layers, int) and layers <= MOST_LAYERS and isinstance(first, int):
        kinds = ["full_attention" if layer < first else "sliding_attention" for layer in range(layers)]
    return {**values, "sliding_window": window, "layer_types": kinds}


def write_qwen_layers(values: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The reverse of `read_qwen_layers`."""
    assert isinstance(config, DecoderConfig)
    return {**values, "use_sliding_window": config.sliding_window is not None}
