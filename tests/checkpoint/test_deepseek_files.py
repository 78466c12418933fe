"""DeepSeek V3's published files, on tiny checkpoints of that layout: FP8 in squares, and the head that drafts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checks import LOGITS, load_theirs, make_ours, tokens
from safetensors.torch import load_file, save_file
from test_deepseek import v3
from torch import Tensor
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from openbook.checkpoint.folder import load_model, load_prediction_head, save_model
from openbook.checkpoint.key_convert import to_hf
from openbook.checkpoint.key_maps.deepseek import prediction_head_table
from openbook.core.errors import UserError
from openbook.models.base import CausalModel, init_weights
from openbook.models.context import CachedContext, DenseContext
from openbook.models.deepseek import DeepseekV3
from openbook.models.deepseek_mtp import PredictionHead
from openbook.models.layers.packed import Fp8Experts
from openbook.models.registry import config_to_hf
from openbook.ops.torch_ops import TorchOps

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
# None of these divides 128.
ODD = {"hidden_size": 160, "moe_intermediate_size": 136, "kv_lora_rank": 130, "qk_nope_head_dim": 34}


def squares(weight: Tensor) -> list[tuple[slice, slice, int, int]]:
    """Rows, columns and place of each square of 128."""
    return [
        (slice(r, r + 128), slice(c, c + 128), r // 128, c // 128)
        for r in range(0, weight.shape[0], 128)
        for c in range(0, weight.shape[1], 128)
    ]


def quantise(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 weights, their scales, and what they stand for, square by square."""
    packed = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty([-(-size // 128) for size in weight.shape])
    meant = torch.empty_like(weight)
    for rows, columns, r, c in squares(weight):
        scales[r, c] = weight[rows, columns].abs().max() / 448.0
        packed[rows, columns] = (weight[rows, columns] / scales[r, c]).to(torch.float8_e4m3fn)
        meant[rows, columns] = packed[rows, columns].float() * scales[r, c]
    return packed, scales, meant


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder in FP8, and one with the same weights in float32."""
    root = tmp_path_factory.mktemp("deepseek")
    plain, packed = root / "plain", root / "packed"
    save_model(make_ours(v3(**ODD)), plain)
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        is_packed = tensor.dim() == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight", "gate.weight"))
        if is_packed:
            stored[name], stored[f"{name}_scale_inv"], meant[name] = quantise(tensor)
        else:
            stored[name] = meant[name] = tensor
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    packed.mkdir()
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((plain / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**values, "quantization_config": FP8}))
    return packed, plain


def test_fp8_files_give_the_bits_of_their_weights(published: tuple[Path, Path]) -> None:
    packed, plain = (load_model(folder, TorchOps()) for folder in published)
    ids = tokens(plain.config, 2, 9)
    with torch.inference_mode():
        assert torch.equal(packed(ids, DenseContext(2, 9)), plain(ids, DenseContext(2, 9)))


def test_experts_stay_packed_and_are_saved_as_they_were(published: tuple[Path, Path], tmp_path: Path) -> None:
    model = load_model(published[0], TorchOps(), dtype=torch.bfloat16)
    experts = [module for module in model.modules() if isinstance(module, Fp8Experts)]
    assert len(experts) == 2
    num_weights = 8 * 3 * 136 * 160
    for module in experts:
        num_bytes = sum(buffer.nbytes for buffer in module.buffers())
        assert num_weights < num_bytes < 1.01 * num_weights
        assert not list(module.parameters())
    save_model(model, tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (published[0], tmp_path))
    names = [name for name in before if ".mlp.experts." in name]
    assert len(names) == 2 * 8 * 3 * 2
    for name in names:
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
    again = load_model(tmp_path, TorchOps(), dtype=torch.bfloat16)
    ids = tokens(model.config, 1, 6)
    with torch.inference_mode():
        assert torch.equal(again(ids, DenseContext(1, 6)), model(ids, DenseContext(1, 6)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fmt": "e5m2"}, "quantization_config has fmt 'e5m2', only 'e4m3' is implemented"),
        ({"weight_block_size": [64, 64]}, "quantization_config has weight_block_size [64, 64], only [128, 128] is"),
        ({"weight_block_size": None}, "quantization_config has weight_block_size None, only [128, 128] is implemented"),
        ({"quant_method": "awq"}, "quantization_config has quant_method 'awq', only 'fp8' is implemented"),
    ],
)
def test_other_quantisations_are_refused(
    published: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    values = json.loads((published[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": {**FP8, **change}}))
    with pytest.raises(UserError) as caught:
        load_model(tmp_path, TorchOps())
    assert message in str(caught.value)


def test_missing_scales_are_named(published: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(published[0] / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((published[0] / "config.json").read_text())
    with pytest.raises(UserError, match=rf"{name} is FP8 with no scales, expected {name}_scale_inv of shape \[2, 1\]"):
        load_model(tmp_path, TorchOps())


@pytest.fixture(scope="module")
def with_head(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CausalModel, PredictionHead]:
    """A folder that carries a head, and what is in it."""
    folder = tmp_path_factory.mktemp("head")
    model = make_ours(v3(num_nextn_predict_layers=1))
    assert isinstance(model, DeepseekV3)
    head = PredictionHead(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in (*head.parameters(), *head.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + (1.0 if tensor.dim() == 1 else 0.0))
    save_model(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= to_hf(head.state_dict(), model.config, prediction_head_table(model.config))
    # Published files repeat what the head shares with the model.
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, model, head


def test_the_head_is_skipped_by_the_model_and_loaded_on_its_own(
    with_head: tuple[Path, CausalModel, PredictionHead],
) -> None:
    folder, model, head = with_head
    loaded = load_model(folder, TorchOps())
    assert isinstance(loaded, DeepseekV3)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    drafter = load_prediction_head(folder, loaded)
    expected = head.state_dict()
    assert drafter.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in drafter.state_dict().items())


def test_the_head_computes_what_transformers_does(
    with_head: tuple[Path, CausalModel, PredictionHead],
) -> None:
    folder, model, head = with_head
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    theirs = MtpModel(reference, 1).eval()
    layer = theirs.layers[0]
    with torch.no_grad():
        for ours, other in ((head.enorm, layer.enorm), (head.hnorm, layer.hnorm), (head.norm, layer.post_norm)):
            other.weight.copy_(ours.weight)
        layer.eh_proj.weight.copy_(head.eh_proj.weight)
        block = {name.removeprefix("block."): t for name, t in head.state_dict().items() if name.startswith("block.")}
        gate, up = block.pop("mlp.shared_expert.gate_up_proj.weight").chunk(2)
        block["mlp.shared_experts.gate_proj.weight"], block["mlp.shared_experts.up_proj.weight"] = gate, up
        block["mlp.shared_experts.down_proj.weight"] = block.pop("mlp.shared_expert.down_proj.weight")
        # Its rows stand in another order in files.
        name = "self_attn.kv_b_proj.weight"
        block[name] = load_file(folder / "model.safetensors")[f"model.layers.3.{name}"]
        layer.mtp_block.load_state_dict(block)
    ids = tokens(model.config, 1, 9)
    with torch.inference_mode():
        hidden = reference(ids[:, :-1], output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(model.hidden_states(ids[:, :-1], DenseContext(1, 8)), hidden, **LOGITS)
        positions = torch.arange(1, 9)[None]
        cache = MtpCache(config=reference.config.get_mtp_config())
        expected = theirs.forward_layer(0, hidden, positions, cache, input_ids=ids[:, 1:])
        actual = head(hidden, ids[:, 1:], DenseContext(1, 8))
        torch.testing.assert_close(actual, expected, **LOGITS)
        assert head.draft(hidden, ids[:, 1:], DenseContext(1, 8)).item() == reference.lm_head(expected)[0, -1].argmax()


def test_a_head_in_fp8_drafts_as_its_weights_say(
    with_head: tuple[Path, CausalModel, PredictionHead], tmp_path: Path
) -> None:
    folder, _, _ = with_head
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight")):
            stored[name], stored[f"{name}_scale_inv"], meant[name] = quantise(tensor)
        else:
            stored[name] = meant[name] = tensor
    values = json.loads((folder / "config.json").read_text())
    outputs = []
    for path, tensors, more in ((plain, meant, {}), (packed, stored, {"quantization_config": FP8})):
        path.mkdir()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({**values, **more}))
        model = load_model(path, TorchOps())
        assert isinstance(model, DeepseekV3)
        head, ids = load_prediction_head(path, model), tokens(model.config, 2, 7)
        assert any(isinstance(module, Fp8Experts) for module in head.modules()) == (path == packed)
        with torch.inference_mode():
            hidden = model.hidden_states(ids, DenseContext(2, 7))[:, :-1]
            outputs.append(head(hidden, ids[:, 1:], DenseContext(2, 6)))
    assert torch.equal(*outputs)


def test_drafting_in_steps_equals_one_pass(with_head: tuple[Path, CausalModel, PredictionHead]) -> None:
    _, model, head = with_head
    ids = tokens(model.config, 2, 10)
    with torch.inference_mode():
        hidden = model.hidden_states(ids, DenseContext(2, 10))[:, :-1]
        whole = head(hidden, ids[:, 1:], DenseContext(2, 9))
        context = CachedContext(head.cache_config, batch=2, capacity=9)
        pieces = []
        for start, end in ((0, 5), (5, 6), (6, 9)):
            context.append([end - start] * 2)
            pieces.append(head(hidden[:, start:end], ids[:, start + 1 : end + 1], context))
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **LOGITS)


def test_a_model_without_head_says_so(tmp_path: Path) -> None:
    model = make_ours(v3())
    assert isinstance(model, DeepseekV3)
    save_model(model, tmp_path)
    with pytest.raises(UserError, match=r"num_nextn_predict_layers is 0, expected 1 or more: the model has none to"):
        load_prediction_head(tmp_path, model)
    assert "num_nextn_predict_layers" in config_to_hf(model.config)
    init_weights(model, 0)
    assert load_theirs(tmp_path) is not None
