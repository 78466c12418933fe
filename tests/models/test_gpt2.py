"""GPT-2's configuration and files, and what GPT-3's shape adds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openbook.checkpoint.folder import load_model, save_model
from openbook.checkpoint.safetensors_io import load_tensors, save_tensors
from openbook.core.errors import UserError
from openbook.models.base import CausalModel, init_weights
from openbook.models.configs.gpt2 import GPT2Config, GPT3Config
from openbook.models.context import CachedContext, DenseContext
from openbook.models.registry import build_model, config_from_hf, config_to_hf
from openbook.ops.torch_ops import TorchOps
from openbook.train.recipe import load_recipe

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
}
GPT2_CONFIG = GPT2Config(**SIZES)
GPT3_CONFIG = GPT3Config(**SIZES, local_window=3)

# As published with the smallest model.
PUBLISHED: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


def make_model(config: GPT2Config = GPT2_CONFIG) -> CausalModel:
    model = build_model(config, TorchOps())
    init_weights(model, 0)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(1))


def logits(model: CausalModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, DenseContext(*ids.shape))


def test_published_configuration() -> None:
    config = config_from_hf(PUBLISHED, "config.json")
    assert config == GPT2Config(
        vocab_size=50257,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    assert sum(parameter.numel() for parameter in build_model(config, TorchOps(), "meta").parameters()) == 124_439_808
    assert config_from_hf(config_to_hf(config), "config.json") == config


def test_spellings() -> None:
    config = config_from_hf(PUBLISHED, "config.json")
    general = {**PUBLISHED, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "n_inner": None}
    for key in ("n_embd", "n_layer", "n_head", "n_positions"):
        del general[key]
    # n_positions came after n_ctx, and is not there here.
    assert config_from_hf({**general, "activation_function": "gelu_pytorch_tanh"}, "config.json") == config
    changed = {"n_inner": 100, "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "n_ctx": 5}
    wide = config_from_hf({**PUBLISHED, **changed, "reorder_and_upcast_attn": True}, "config.json")
    assert isinstance(wide, GPT2Config)
    assert (wide.intermediate_size, wide.scale_attn_weights, wide.scale_attn_by_inverse_layer_idx) == (100, False, True)
    assert wide.max_position_embeddings == 1024


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"activation_function": "relu"},
            r"^config.json: activation_function is 'relu', only gelu_new, gelu_pytorch_tanh are implemented: use an",
        ),
        ({"add_cross_attention": True}, r"^config.json: add_cross_attention is True, only False is implemented"),
        ({"n_head": 5}, r"^config.json: model: 5 heads of 6 do not make hidden_size 32: change one of them$"),
        ({"n_head": 0}, r"^config.json: model: num_attention_heads is 0, expected more than 0"),
        ({"n_embd": "32"}, r"^config.json: .*hidden_size"),
        ({"layer_norm_epsilon": 0}, r"^config.json: model: layer_norm_epsilon is 0"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads is 2, gpt2 has as many as num_attention_heads, 4: change"),
        ({"n_heads": 4}, r"^config.json: .*n_heads"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config_from_hf({**config_to_hf(GPT2_CONFIG), **fields}, "config.json")
    assert "\n" not in str(caught.value)


def test_files_of_the_bare_decoder_with_masks(tmp_path: Path) -> None:
    model = make_model()
    save_model(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_tensors(file)
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)
    assert "lm_head.weight" not in tensors
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for layer in range(2):
        bare[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        bare[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_tensors(file, bare)
    torch.testing.assert_close(logits(load_model(tmp_path, TorchOps()), tokens(2, 9)), logits(model, tokens(2, 9)))


def test_a_tied_matrix_stored_twice(tmp_path: Path) -> None:
    save_model(make_model(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_tensors(file)
    embedding = tensors["transformer.wte.weight"]
    save_tensors(file, {**tensors, "lm_head.weight": embedding.clone()})
    load_model(tmp_path, TorchOps())
    save_tensors(file, {**tensors, "lm_head.weight": embedding + 1})
    with pytest.raises(UserError, match=r"lm_head\.weight differs from transformer\.wte\.weight although config\.json"):
        load_model(tmp_path, TorchOps())


def test_a_matrix_that_is_not_transposed_is_refused(tmp_path: Path) -> None:
    save_model(make_model(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_tensors(file)
    tensors["transformer.h.1.mlp.c_fc.weight"] = tensors["transformer.h.1.mlp.c_fc.weight"].T.contiguous()
    save_tensors(file, tensors)
    with pytest.raises(UserError, match=r"has shape \[32, 128\], config\.json says \[128, 32\]: weights and"):
        load_model(tmp_path, TorchOps())


def test_rows_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(UserError, match=r"^got a row of 17 tokens, the model has 16 positions: shorten it$"):
        logits(make_model(), tokens(1, 17))


def test_padding_past_the_last_position() -> None:
    model, ids = make_model(), tokens(2, 16)
    expected = logits(model, ids)
    context = CachedContext(GPT2_CONFIG, batch=2, capacity=16)
    with torch.inference_mode():
        context.append([14, 1])
        model(torch.stack([ids[0, :14], ids[1, :1].expand(14)]), context)
        context.append([2, 6])  # the first row's padding stands at positions 16 to 19
        got = model(torch.stack([ids[0, 14:].repeat(3), ids[1, 1:7]]), context)
    torch.testing.assert_close(got[0, :2], expected[0, 14:], atol=1e-5, rtol=0)
    torch.testing.assert_close(got[1], expected[1, 1:7], atol=1e-5, rtol=0)


def test_residual_projections_start_smaller() -> None:
    config = GPT2Config(**{**SIZES, "hidden_size": 128, "head_dim": 32, "num_hidden_layers": 8})
    model = make_model(config)
    for name, parameter in model.named_parameters():
        expected = 0.2 / math.sqrt(16) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.2
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
        else:
            assert (parameter == (1.0 if name.endswith("norm.weight") else 0.0)).all(), name


def influence(model: CausalModel, ids: Tensor, position: int) -> list[bool]:
    """Which tokens change the logits at `position`."""
    before = logits(model, ids)[0, position]
    changed = []
    for place in range(ids.shape[1]):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % 61
        changed.append(not torch.equal(logits(model, other)[0, position], before))
    return changed


@pytest.mark.parametrize(("alone", "first"), [(0, 0), (1, 6)])
def test_every_second_layer_of_gpt3_sees_a_band(alone: int, first: int) -> None:
    model = make_model(GPT3_CONFIG)
    with torch.no_grad():
        # The other layer's attention adds nothing.
        model.model.layers[1 - alone].self_attn.o_proj.weight.zero_()
    assert influence(model, tokens(1, 12), 8) == [first <= place <= 8 for place in range(12)]


def test_gpt3_caches_a_band() -> None:
    assert [layer.window for layer in GPT3_CONFIG.cache_layers] == [None, 3]
    model, ids = make_model(GPT3_CONFIG), tokens(2, 14)
    expected = logits(model, ids)
    context = CachedContext(GPT3_CONFIG, batch=2, capacity=16)
    with torch.inference_mode():
        for start, end in ((0, 5), (5, 12), (12, 13), (13, 14)):
            context.append([end - start] * 2)
            piece = model(ids[:, start:end], context)
            torch.testing.assert_close(piece, expected[:, start:end], atol=1e-5, rtol=0)


def test_gpt3_trains_and_is_kept(tmp_path: Path) -> None:
    config = GPT3Config(**{**SIZES, "initializer_range": 0.02}, local_window=3)
    model = make_model(config)
    ids = tokens(2, 12)
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        loss = model.loss(ids, targets, DenseContext(2, 12)) / 22
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(61), rel=0.1)
    assert losses[-1] < 0.5 * losses[0]
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, TorchOps())
    assert loaded.config == config
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_gpt3_of_the_paper() -> None:
    """arXiv 2005.14165, table 2.1: the largest, and the XL, whose heads are wider than its stream."""
    shape = {
        **SIZES,
        "vocab_size": 50257,
        "hidden_size": 12288,
        "intermediate_size": 4 * 12288,
        "num_hidden_layers": 96,
        "num_attention_heads": 96,
        "num_key_value_heads": 96,
        "head_dim": 128,
        "max_position_embeddings": 2048,
    }
    model = build_model(GPT3Config(**shape, local_window=256), TorchOps(), "meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e9) == 175
    wide_heads = GPT3Config(**{**SIZES, "head_dim": 12}, local_window=4)
    assert config_from_hf(config_to_hf(wide_heads), "config.json") == wide_heads
    assert logits(make_model(wide_heads), tokens(1, 5)).shape == (1, 5, 61)


def test_gpt3_needs_a_window() -> None:
    values = {key: value for key, value in config_to_hf(GPT3_CONFIG).items() if key != "local_window"}
    with pytest.raises(UserError, match=r"^config\.json: .*local_window"):
        config_from_hf(values, "config.json")
    with pytest.raises(UserError, match="model: local_window is 0, expected more than 0"):
        GPT3Config(**SIZES, local_window=0)


def test_a_recipe_can_ask_for_gpt3(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "recipes" / "nano.toml").read_text()
    head, _, rest = text.partition("[model]\n")
    fields = {key: value for key, value in SIZES.items() if key != "vocab_size"} | {"local_window": 3}
    table = "".join(f"{key} = {value}\n" for key, value in {**fields, "max_position_embeddings": 2048}.items())
    file = tmp_path / "gpt3.toml"
    file.write_text(f'{head}[model]\nmodel_type = "gpt3"\n{table}\n[{rest.partition("[")[2]}')
    config = load_recipe(file).model_config(300)
    assert isinstance(config, GPT3Config)
    assert (config.vocab_size, config.local_window) == (300, 3)
