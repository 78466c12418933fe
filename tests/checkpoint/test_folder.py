"""Model folders: exact round trip, same bytes, and one line for everything that can be wrong with one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from openbook.checkpoint.folder import load_config, load_model, save_model
from openbook.checkpoint.key_convert import from_hf, to_hf
from openbook.checkpoint.key_maps import KEY_MAPS
from openbook.checkpoint.safetensors_io import load_tensors, save_tensors
from openbook.core.errors import UserError
from openbook.models.base import CausalModel, init_weights
from openbook.models.config import DecoderConfig
from openbook.models.registry import build_model
from openbook.ops.torch_ops import TorchOps

CONFIG = DecoderConfig(
    vocab_size=13,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    max_position_embeddings=32,
)


def make_model() -> CausalModel:
    model = build_model(CONFIG, TorchOps())
    init_weights(model, 0)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(make_model(), tmp_path / "model")
    return tmp_path / "model"


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(folder, TorchOps())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_tensors(folder / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_tensors(folder / "model.safetensors", tensors)


def test_round_trip(folder: Path) -> None:
    assert load_config(folder) == CONFIG
    loaded, original = load_model(folder, TorchOps()), make_model()
    assert loaded.config == CONFIG
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    torch.testing.assert_close(loaded.state_dict(), original.state_dict(), atol=0, rtol=0)
    assert {p.dtype for p in load_model(folder, TorchOps(), dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_same_weights_same_bytes(folder: Path, tmp_path: Path) -> None:
    save_model(load_model(folder, TorchOps()), tmp_path / "again")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_config_names_the_transformers_class(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    assert values["architectures"] == ["Qwen3ForCausalLM"]
    assert (values["model_type"], values["dtype"]) == ("qwen3", "float32")


def test_key_map_goes_both_ways() -> None:
    ours = make_model().state_dict()
    theirs = to_hf(ours, CONFIG, KEY_MAPS["qwen3"])
    assert len(theirs) == 2 + 2 * 11
    torch.testing.assert_close(from_hf(theirs, CONFIG, KEY_MAPS["qwen3"], "x"), dict(ours), atol=0, rtol=0)


def test_missing_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none").startswith(f"cannot read the model configuration {tmp_path / 'none'}/config.json")


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == (
        f"the model {folder} has neither model.safetensors nor model.safetensors.index.json: fetch the whole folder"
    )


def test_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "is not valid JSON" in refusal(folder)
    (folder / "config.json").write_text("[1]")
    assert refusal(folder) == f"{folder / 'config.json'} has an unexpected form, expected a JSON object: fetch it again"


@pytest.mark.parametrize("kept", [0, 5, 8, 200, -1])
def test_truncated_weights(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(folder)
    assert message.startswith(f"the weights {path} are not a whole safetensors file (")
    assert message.endswith("): copy or download the file again")


def test_not_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_text("a letter to the editor\n" * 50)
    assert "are not a whole safetensors file" in refusal(folder)


def test_weights_that_are_a_folder_or_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder, expected a safetensors file: give the file inside it$"):
        load_tensors(tmp_path)
    with pytest.raises(UserError, match=r"^cannot read the weights .*none: No such file or directory; check the path$"):
        load_tensors(tmp_path / "none")


def test_missing_and_unknown_tensors(folder: Path) -> None:
    edit_weights(folder, extra__weight=torch.zeros(1))
    assert refusal(folder) == (
        f"the model {folder} has unknown tensors extra.weight: "
        "weights and config.json do not belong together, fetch both again"
    )
    edit_weights(folder, extra__weight=None, model__norm__weight=None)
    assert refusal(folder).startswith(f"the model {folder} lacks tensors model.norm.weight: ")


def test_layers_of_another_model_are_counted(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 1}))
    assert "model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, " in (
        message := refusal(folder)
    )
    assert "and 8 more: " in message


def test_wrong_shapes(folder: Path) -> None:
    edit_weights(folder, model__norm__weight=torch.ones(9))
    assert "model.norm.weight has shape [9], config.json says [8]" in refusal(folder)
    edit_weights(folder, model__norm__weight=torch.ones(8), model__layers__0__mlp__up_proj__weight=torch.ones(11, 8))
    assert "model.layers.0.mlp.up_proj.weight has shape [11, 8], config.json says [12, 8]" in refusal(folder)


def test_tied_matrix_stored_twice(folder: Path) -> None:
    embedding = load_tensors(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(folder, lm_head__weight=embedding.clone())
    load_model(folder, TorchOps())
    edit_weights(folder, lm_head__weight=embedding + 1)
    assert refusal(folder) == (
        f"the model {folder}: lm_head.weight differs from model.embed_tokens.weight although config.json ties them: "
        "set tie_word_embeddings to false there"
    )


def test_shards(folder: Path) -> None:
    tensors = load_tensors(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for file, part in files.items():
        safetensors.torch.save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in files.items() for name in part}}))
    torch.testing.assert_close(load_model(folder, TorchOps()).state_dict(), make_model().state_dict(), atol=0, rtol=0)
    (folder / "b.safetensors").unlink()
    assert refusal(folder).startswith(f"cannot read the weights {folder / 'b.safetensors'}: ")
    index.write_text(json.dumps({"weight_map": {"x": "../b.safetensors"}}))
    assert refusal(folder).endswith("names '../b.safetensors', expected a file beside it: fetch it again")


def test_save_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cannot write .*model.safetensors: "):
        save_model(make_model(), tmp_path / "file")


def test_loading_imports_no_compiler(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from openbook.checkpoint.folder import load_model; "
        "from openbook.ops.torch_ops import TorchOps; load_model(Path(sys.argv[1]), TorchOps()); "
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'transformers', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
