"""Adapters from PEFT's folders: which rows of which of our matrices they update, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from openbook.checkpoint.folder import save_model
from openbook.checkpoint.lora import read_adapter
from openbook.core.errors import UserError
from openbook.models.base import init_weights
from openbook.models.config import DecoderConfig, ModelConfig
from openbook.models.configs.deepseek import DeepseekV3Config
from openbook.models.configs.gpt2 import GPT2Config
from openbook.models.configs.gpt_oss import GptOssConfig
from openbook.models.configs.qwen2_vl import Qwen2VLConfig, VisionConfig
from openbook.models.configs.qwen_moe import Qwen2MoeConfig
from openbook.models.layers.linear import Linear
from openbook.models.registry import build_model
from openbook.ops.torch_ops import TorchOps
from peft_folders import module_shapes, save_adapter, write_adapter

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LLAMA = DecoderConfig(model_type="llama", **SIZES)
MOE = {**SIZES, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10}
CONFIGS: dict[str, ModelConfig] = {
    "llama": LLAMA,
    "qwen2": DecoderConfig(model_type="qwen2", **SIZES),
    "qwen3": DecoderConfig(model_type="qwen3", **SIZES),
    "gpt2": GPT2Config(**{**SIZES, "num_key_value_heads": 4}),
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(
        **MOE, num_experts=4, shared_expert_intermediate_size=40, mlp_only_layers=(0,), tie_word_embeddings=False
    ),
    "deepseek_v3": DeepseekV3Config(
        **{**MOE, "num_key_value_heads": 4, "head_dim": 4},
        **LATENT,
        q_lora_rank=20,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
    "qwen2_vl": Qwen2VLConfig(
        **SIZES,
        mrope_section=(1, 1, 2),
        image_token_id=3,
        vision_start_token_id=4,
        vision_end_token_id=5,
        vision_config=VisionConfig(depth=1, embed_dim=16, num_heads=2, hidden_size=32, mlp_ratio=2, patch_size=4),
    ),
}
# As PEFT 0.21.2 writes it, but for the numbers.
PEFT_CONFIG = """{
  "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
  "base_model_name_or_path": "some/model", "bias": "none", "corda_config": null, "ensure_weight_tying": false,
  "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true,
  "init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
  "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 16, "lora_bias": false, "lora_dropout": 0.05,
  "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
  "monteclora_config": null, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4,
  "rank_pattern": {}, "revision": null, "target_modules": ["v_proj", "q_proj"], "target_parameters": null,
  "task_type": "CAUSAL_LM", "trainable_token_indices": null, "use_bdlora": null, "use_dora": false,
  "use_qalora": false, "use_rslora": false, "velora_config": null
}"""


def make_folder(config: ModelConfig, folder: Path) -> Path:
    model = build_model(config, TorchOps())
    init_weights(model, 1)
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(LLAMA, tmp_path_factory.mktemp("lora") / "llama")


def tensors_of(adapter: Path, module: str) -> tuple[np.ndarray, np.ndarray]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"].float().numpy() for part in "AB")
    return a, b


def change(adapter: Path, **settings: Any) -> Path:
    """The same adapter with other settings; None takes one away."""
    file = adapter / "adapter_config.json"
    config = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return adapter


def test_parts_of_one_matrix_update_rows_of_their_own(llama: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "tone", llama, rank=4)
    adapter = read_adapter(folder, LLAMA)
    assert adapter.name == "tone" and adapter.max_rank == 4
    assert [*adapter.matrices] == [
        f"model.layers.{layer}.{name}"
        for layer in range(2)
        for name in ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj")
    ]
    for ours, parts in {
        "self_attn.qkv_proj": {"self_attn.q_proj": 0, "self_attn.k_proj": 32, "self_attn.v_proj": 48},
        "mlp.gate_up_proj": {"mlp.gate_proj": 0, "mlp.up_proj": 56},
        "mlp.down_proj": {"mlp.down_proj": 0},
    }.items():
        updates = adapter.matrices[f"model.layers.1.{ours}"]
        assert [update.first_row for update in updates] == [*parts.values()]
        for update, theirs in zip(updates, parts, strict=True):
            a, b = tensors_of(folder, f"model.layers.1.{theirs}")
            np.testing.assert_array_equal(update.a, a)
            np.testing.assert_array_equal(update.b, 2 * b)  # lora_alpha / r
    assert adapter.num_bytes == 4 * 4 * sum(sum(shape) for shape in module_shapes(llama).values())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = make_folder(config, tmp_path / "model")
    adapter = read_adapter(save_adapter(tmp_path / "adapter", model, rank=3), config)
    linears = {
        path: tuple(linear.weight.shape)
        for path, linear in build_model(config, TorchOps(), device="meta").named_modules()
        if isinstance(linear, Linear) and path.startswith("model.layers.") and "kv_b_proj" not in path
    }
    assert adapter.matrices.keys() == linears.keys()
    for path, updates in adapter.matrices.items():  # all rows, each once
        ends = np.cumsum([len(update.b) for update in updates]).tolist()
        assert [update.first_row for update in updates] == [0, *ends[:-1]]
        assert {(ends[-1], update.a.shape[1]) for update in updates} == {linears[path]}


def test_the_configuration_that_peft_writes(llama: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", llama, targets=("q_proj", "v_proj"))
    (folder / "adapter_config.json").write_text(PEFT_CONFIG)
    adapter = read_adapter(folder, LLAMA, "renamed")
    assert adapter.name == "renamed"
    q, v = adapter.matrices["model.layers.0.self_attn.qkv_proj"]
    assert (q.first_row, v.first_row) == (0, 48)
    np.testing.assert_array_equal(v.b, 4 * tensors_of(folder, "model.layers.0.self_attn.v_proj")[1])


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, (2.0, 2.0, 2.0)),
        ({"lora_alpha": 3}, (0.75, 0.75, 0.75)),
        ({"use_rslora": True}, (4.0, 4.0, 4.0)),
        ({"alpha_pattern": {"self_attn.o_proj": 4}}, (1.0, 2.0, 1.0)),
        ({"alpha_pattern": {"layers.0.*proj": 2, "o_proj": 4}, "use_rslora": True}, (1.0, 1.0, 2.0)),
        ({"alpha_pattern": {"proj": 4, "down": 4}}, (2.0, 2.0, 2.0)),
    ],
    ids=str,
)
def test_scales(settings: dict[str, Any], scales: tuple[float, ...], llama: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", llama, targets=("o_proj", "down_proj"), **settings)
    adapter = read_adapter(folder, LLAMA)
    for name, scale in zip(("0.self_attn.o_proj", "0.mlp.down_proj", "1.self_attn.o_proj"), scales, strict=True):
        b = tensors_of(folder, f"model.layers.{name}")[1]
        np.testing.assert_array_equal(adapter.matrices[f"model.layers.{name}"][0].b, np.float32(scale) * b)


def test_ranks_by_pattern(llama: Path, tmp_path: Path) -> None:
    wide = save_adapter(tmp_path / "wide", llama, rank=8, targets=("o_proj",))
    narrow = save_adapter(tmp_path / "narrow", llama, rank=2, targets=("down_proj",))
    both = {
        name: tensor for one in (wide, narrow) for name, tensor in load_file(one / "adapter_model.safetensors").items()
    }
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "rank_pattern": {"down_proj": 2}}
    adapter = read_adapter(write_adapter(tmp_path / "both", config, both), LLAMA)
    (o_proj,), (down_proj,) = (
        adapter.matrices[f"model.layers.0.{name}"] for name in ("self_attn.o_proj", "mlp.down_proj")
    )
    assert (len(o_proj.a), len(down_proj.a)) == (8, 2)
    np.testing.assert_array_equal(down_proj.b, 4 * tensors_of(narrow, "model.layers.0.mlp.down_proj")[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_numbers_are_those_of_the_file(dtype: torch.dtype, llama: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", llama, dtype=dtype)
    update = read_adapter(folder, LLAMA).matrices["model.layers.0.mlp.down_proj"][0]
    a, b = tensors_of(folder, "model.layers.0.mlp.down_proj")
    assert update.a.dtype == update.b.dtype == np.float32
    np.testing.assert_array_equal(update.a, a)
    np.testing.assert_array_equal(update.b, 2 * b)


def test_equal_numbers_have_one_digest(llama: Path, tmp_path: Path) -> None:
    narrow = save_adapter(tmp_path / "narrow", llama, dtype=torch.bfloat16)
    wide = {name: tensor.float() for name, tensor in load_file(narrow / "adapter_model.safetensors").items()}
    config = json.loads((narrow / "adapter_config.json").read_text())
    write_adapter(tmp_path / "wide", {**config, "revision": "another", "lora_dropout": 0.3}, wide)
    digest = read_adapter(narrow, LLAMA).digest
    assert digest == read_adapter(tmp_path / "wide", LLAMA).digest and len(digest) == 64
    assert digest != read_adapter(change(narrow, lora_alpha=9), LLAMA).digest
    assert digest != read_adapter(save_adapter(tmp_path / "other", llama, seed=1, dtype=torch.bfloat16), LLAMA).digest


def test_other_spellings_of_names(tmp_path: Path) -> None:
    for family, old, new in (
        ("gpt2", "base_model.model.transformer.h.", "base_model.model.h."),
        ("qwen2_vl", "base_model.model.model.layers.", "base_model.model.model.language_model.layers."),
    ):
        config = CONFIGS[family]
        plain = save_adapter(tmp_path / family / "plain", make_folder(config, tmp_path / family / "model"))
        spelled = {
            name.replace(old, new): tensor for name, tensor in load_file(plain / "adapter_model.safetensors").items()
        }
        settings = json.loads((plain / "adapter_config.json").read_text())
        other = write_adapter(tmp_path / family / "other", settings, spelled)
        assert not any(name.startswith(old) for name in spelled)
        assert read_adapter(other, config).digest == read_adapter(plain, config).digest


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": r".*\.1\..*(down|o)_proj"},
        {"exclude_modules": ["layers.0.mlp.down_proj", "layers.0.self_attn.o_proj"]},
        {"target_modules": ["model.layers.1.mlp.down_proj", "layers.1.self_attn.o_proj"], "layers_to_transform": [1]},
        {"target_modules": None},
    ],
    ids=str,
)
def test_an_adapter_of_some_layers(settings: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", llama, targets=("o_proj", "down_proj"))
    weights = folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if ".layers.1." in name}, weights)
    with pytest.raises(UserError) as error:
        read_adapter(folder, LLAMA)
    assert str(error.value) == (
        f"the adapter {folder} lacks tensors for model.layers.0.mlp.down_proj, model.layers.0.self_attn.o_proj, which "
        "its target_modules name: it belongs to another model, or copy it again"
    )
    adapter = read_adapter(change(folder, **settings), LLAMA)
    assert [*adapter.matrices] == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"]


MERGE = (
    "merge it into the model where you trained it (PEFT: merge_and_unload, then save_pretrained) and give that model"
)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"peft_type": "IA3"}, f"peft_type is 'IA3', only 'LORA' is implemented: {MERGE}"),
        ({"peft_type": None}, f"peft_type is None, only 'LORA' is implemented: {MERGE}"),
        ({"bias": "all"}, f"bias is 'all', only 'none' is implemented: {MERGE}"),
        ({"use_dora": True}, f"use_dora is True, which is not implemented: {MERGE}"),
        ({"modules_to_save": ["lm_head"]}, f"modules_to_save is ['lm_head'], which is not implemented: {MERGE}"),
        ({"lora_bias": True}, f"lora_bias is True, which is not implemented: {MERGE}"),
        ({"layer_replication": [[0, 2]]}, f"layer_replication is [[0, 2]], which is not implemented: {MERGE}"),
        ({"of_the_future": {"a": 1}}, f"of_the_future is {{'a': 1}}, which is not implemented: {MERGE}"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is 'pissa_niter_4', which changes the model's own weights too: save it with "
            f"path_initial_model_for_weight_conversion (PEFT: save_pretrained), or {MERGE}",
        ),
        ({"r": 0}, "the rank r is 0, expected 1 or more; correct it"),
        ({"rank_pattern": {"o_proj": -1}}, "the rank r is -1, expected 1 or more; correct it"),
        ({"r": "4"}, "r: expected `int`, got `str`; correct that value"),
        ({"r": None}, "the key r is missing: add it"),
        ({"alpha_pattern": {"(": 1}}, "'(.*\\\\.)?(()$' is no regular expression"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(settings: dict[str, Any], expected: str, llama: Path, tmp_path: Path) -> None:
    folder = change(save_adapter(tmp_path / "adapter", llama), **settings)
    with pytest.raises(UserError) as error:
        read_adapter(folder, LLAMA)
    assert str(error.value).startswith(f"{folder / 'adapter_config.json'}: {expected}")
    assert "\n" not in str(error.value)


A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB")
HEAD = "base_model.model.lm_head.lora_{}.weight"
EXPERT = "base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({A: None}, " lacks lora_A of model.layers.0.self_attn.q_proj: copy it again"),
        (
            {B: torch.zeros(31, 4)},
            f": {B} has shape [31, 4], expected [32, 4] for rank 4 and this model: use the model it was trained on, or "
            "copy it again",
        ),
        ({A: torch.zeros(5, 32)}, f": {A} has shape [5, 32], expected [4, 32] for rank 4"),
        ({A: torch.full((4, 32), torch.nan)}, f": {A} holds infinities or NaN: its training failed"),
        ({A: torch.zeros(4, 32, dtype=torch.int32)}, f": {A} holds I32, expected one of F32, F16, BF16, F64"),
        (
            {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.zeros(32)},
            " has the tensor base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector, which is no "
            f"lora_A or lora_B of a matrix: {MERGE}",
        ),
        (
            {HEAD.format(part): torch.zeros(4, 4) for part in "AB"},
            " updates lm_head, expected only down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj of the 2 "
            f"layers of this llama: use the model it was trained on, or {MERGE}",
        ),
        ({EXPERT.format(part): torch.zeros(4, 4) for part in "AB"}, " updates model.layers.0.mlp.experts.0.up_proj,"),
        ({A.replace("s.0.", "s.2."): torch.zeros(4, 32)}, " updates model.layers.2.self_attn.q_proj, expected only"),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 61)},
            " has the tensor base_model.model.model.embed_tokens.lora_embedding_A, which is no lora_A or lora_B",
        ),
    ],
    ids=range(10),
)
def test_tensors_that_are_refused(
    changes: dict[str, torch.Tensor | None], expected: str, llama: Path, tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path / "adapter", llama)
    weights = folder / "adapter_model.safetensors"
    tensors = {**load_file(weights), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, weights)
    with pytest.raises(UserError) as error:
        read_adapter(folder, LLAMA)
    assert str(error.value).startswith(f"the adapter {folder}{expected}") and "\n" not in str(error.value)


def test_folders_that_are_refused(llama: Path, tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(UserError) as error:
            read_adapter(folder, LLAMA)
        return str(error.value)

    missing = "expected a folder that PEFT's save_pretrained wrote; give that one"
    for folder in (tmp_path / "none", llama):
        assert refusal(folder) == f"the adapter {folder} has no adapter_config.json: {missing}"
    folder = save_adapter(tmp_path / "adapter", llama)
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    assert refusal(folder).startswith(f"the weights {weights} are not a whole safetensors file")
    save_file({}, weights)
    assert (
        refusal(folder)
        == f"the adapter {folder} has no tensors, expected lora_A and lora_B of some matrices: copy it again"
    )
    weights.unlink()
    assert refusal(folder) == f"the adapter {folder} has no adapter_model.safetensors: copy the whole folder again"
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    assert refusal(folder) == (
        f"the adapter {folder} has its weights only as pickle (adapter_model.bin), which can run any code when it is "
        "loaded: convert it to safetensors where you trust it (PEFT: PeftModel.from_pretrained, then save_pretrained), "
        "and give that folder"
    )
    (folder / "adapter_config.json").write_text("[]")
    assert refusal(folder) == (
        f"{folder / 'adapter_config.json'} has an unexpected form, expected a JSON object: copy it again"
    )
    (folder / "adapter_config.json").write_text("{")
    assert "is not valid JSON" in refusal(folder)


def test_no_torch_is_imported(llama: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", llama, dtype=torch.bfloat16)
    code = (
        "import sys\nfrom pathlib import Path\nfrom openbook.checkpoint.lora import read_adapter\n"
        "from openbook.checkpoint.model_source import open_model\n"
        f"adapter = read_adapter(Path({str(folder)!r}), open_model(Path({str(llama)!r})).config)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\nprint(adapter.digest)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == read_adapter(folder, LLAMA).digest
