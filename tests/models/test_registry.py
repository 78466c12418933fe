"""Configurations: both directions, and the text of every refusal."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from tiny_model import CONFIG, make_model

from openbook.core.errors import UserError
from openbook.models.base import init_weights
from openbook.models.config import DecoderConfig
from openbook.models.registry import build_model, config_from_hf, config_to_hf
from openbook.ops.torch_ops import TorchOps


def changed(**fields: Any) -> dict[str, Any]:
    return {**config_to_hf(CONFIG), **fields}


def test_config_goes_both_ways() -> None:
    assert config_from_hf(config_to_hf(CONFIG), "config.json") == CONFIG


def test_older_files_spell_rope_theta_alone() -> None:
    values = changed(rope_theta=5000)
    del values["rope_parameters"]
    assert config_from_hf(values, "config.json").rope_theta == 5000.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "quen3"}, "unknown model_type 'quen3': did you mean 'qwen3'? known: "),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu' is implemented: use another model"),
        ({"attention_bias": True}, "attention_bias is True, only False is implemented: use another model"),
        ({"layer_types": ["sliding_attention"]}, "layer_types has 'sliding_attention' but sliding_window is off"),
        ({"layer_types": 3}, "layer_types is 3, expected a list of words: fetch the file again"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_parameters: the key factor is missing: add it"),
        (
            {"rope_parameters": {"rope_type": "dynamic"}},
            "rope_type is 'dynamic', only default, linear, llama3, yarn are",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, only 1.0 is implemented"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4}},
            "low_freq_factor is 4.0 and high_freq_factor 4.0, expected the first above 0 and below the second",
        ),
        ({"num_experts": 8}, "unknown key 'num_experts'"),
        ({"hidden_size": "wide"}, "hidden_size: expected `int`, got `str`"),
    ],
)
def test_refusals_of_config_json(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from_hf(changed(**fields), "the file config.json")
    assert str(caught.value).startswith("the file config.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_size", "model_type", "vocab_size"])
def test_missing_key(key: str) -> None:
    values = changed()
    del values[key]
    with pytest.raises(UserError, match=f"^config.json: the key {key} is missing: add it"):
        config_from_hf(values, "config.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "model: hidden_size is 0, expected more than 0 and at most 2,147,483,647: correct it"),
        (
            {"rms_norm_eps": -1.0},
            "model: rms_norm_eps is -1.0, expected more than 0 and at most 2,147,483,647: correct it",
        ),
        (
            {"num_key_value_heads": 3},
            "model: num_attention_heads 4 is not a multiple of num_key_value_heads 3: change one of them",
        ),
        ({"head_dim": 7}, "model: head_dim 7 is odd, rotary embedding needs pairs: make it even"),
    ],
)
def test_refusals_of_shapes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        DecoderConfig(**{**msgspec.structs.asdict(CONFIG), **fields})
    assert str(caught.value) == message


def test_unknown_family() -> None:
    config = DecoderConfig(**{**msgspec.structs.asdict(CONFIG), "model_type": "lama"})
    with pytest.raises(UserError, match=r"^the model configuration: unknown model_type 'lama': did you mean 'llama'"):
        build_model(config, TorchOps())


def test_weights_depend_on_the_generator_alone() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first, again, other = make_model(1), make_model(1), make_model(2)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        if a.dim() == 1:
            assert (a == 1).all(), name
        else:
            assert not torch.equal(a, c), name
            assert abs(float(a.detach().std()) / CONFIG.initializer_range - 1) < 0.15


def test_meta_device_takes_no_memory() -> None:
    assert {parameter.device.type for parameter in build_model(CONFIG, TorchOps(), "meta").parameters()} == {"meta"}


def test_init_weights_in_bfloat16_rounds_the_same_numbers() -> None:
    model = build_model(CONFIG, TorchOps()).bfloat16()
    init_weights(model, 0)
    for half, full in zip(model.parameters(), make_model(0).parameters(), strict=True):
        assert torch.equal(half, full.bfloat16())
