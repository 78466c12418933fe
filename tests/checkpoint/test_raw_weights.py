"""Stored weights of dense decoders without torch: the same numbers as the models that torch loads, bit for bit."""

from __future__ import annotations

import json
import mmap
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray

from openbook.checkpoint.convert import GGUF_TYPES, convert_model
from openbook.checkpoint.folder import load_model, save_model
from openbook.checkpoint.gguf_io import FORMATS, GgufFile, TensorPlan, read_gguf, write_gguf
from openbook.checkpoint.locate import locate
from openbook.checkpoint.model_source import ModelSource, open_model
from openbook.checkpoint.raw_matrix import RawMatrix
from openbook.checkpoint.raw_weights import RAW_FAMILIES, RawWeights
from openbook.core.errors import UserError
from openbook.models.config import DecoderConfig, ModelConfig
from openbook.models.configs.gpt2 import GPT2Config, GPT3Config
from openbook.models.registry import build_model, config_to_hf
from openbook.ops.torch_ops import TorchOps
from openbook.tokenizer.chat import Chat, default_template
from openbook.tokenizer.tokenizer import Tokenizer

# Rows of 256, so that every block format divides them.
SIZES: dict[str, Any] = {
    "vocab_size": 274,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "head_dim": 32,
    "max_position_embeddings": 16,
}
CONFIGS: dict[str, ModelConfig] = {
    **{
        name: DecoderConfig(**SIZES, num_key_value_heads=2, model_type=name, tie_word_embeddings=name == "llama")
        for name in ("llama", "mistral", "qwen2", "qwen3")
    },
    "gpt2": GPT2Config(**SIZES, num_key_value_heads=8),
    "gpt3": GPT3Config(**SIZES, num_key_value_heads=8, local_window=4),
}
GGUF_FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
KEPT = {"F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "q8_0", "Q4_0": "q4_0", "Q4_1": "q4_1"}


def make_folder(name: str, folder: Path, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> Path:
    """A model of family `name` in a folder, every weight random."""
    model = build_model(CONFIGS[name], TorchOps())
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    save_model(model.to(dtype), folder)
    Chat(tokenizer, default_template()).save(folder)
    return folder


def in_format(path: Path, out: Path, type_name: str) -> Path:
    """The GGUF file `path` with its layers' matrices in another format, of random bytes that make finite weights."""
    file = read_gguf(path)
    random = np.random.default_rng(0)
    plans, data = [], []
    for name, tensor in file.tensors.items():
        is_other = len(tensor.shape) > 1 and name.startswith("blk.")
        plans.append(TensorPlan(name, tensor.shape, FORMATS[type_name] if is_other else tensor.format))
        size = FORMATS[type_name].num_bytes(tensor.shape)
        data.append(random.integers(0, 60, size, dtype=np.uint8) if is_other else tensor.raw)
    write_gguf(out, file.metadata, plans, data)
    return out


def whole(parts: tuple[RawMatrix, ...]) -> NDArray[np.float32]:
    for part in parts:
        assert part.data.flags.c_contiguous
        assert part.data.flags.aligned
        assert not part.is_transposed
    return np.concatenate([part.floats() for part in parts])


def is_mapped(part: RawMatrix) -> bool:
    """Whether the data are a view of the mapped file."""
    base: Any = part.data
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap.mmap | memoryview)


def assert_as_loaded(source: ModelSource) -> RawWeights:
    """Raw weights have the names, and expanded the bits, of the model's parameters."""
    weights = RawWeights(source)
    parameters = load_model(source, TorchOps()).state_dict()
    assert set(weights) == set(parameters)
    assert len(weights) == len(parameters)
    for name, parameter in parameters.items():
        np.testing.assert_array_equal(whole(weights[name]).view(np.uint32), parameter.numpy().view(np.uint32), name)
    return weights


def test_every_dense_family_is_tried() -> None:
    assert set(CONFIGS) == RAW_FAMILIES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_folders(family: str, dtype: torch.dtype, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = open_model(make_folder(family, tmp_path / "model", tiny_tokenizer, dtype))
    weights = assert_as_loaded(source)
    storage = {torch.float16: "f16", torch.bfloat16: "bf16"}.get(dtype, "f32")
    for name, parts in weights.items():
        is_matrix = len(parts[0].shape) > 1
        assert {part.storage for part in parts} == {storage if is_matrix else "f32"}
        # GPT-2's folders hold [in, out]; anything else is looked at where it lies in the file.
        is_turned = "gpt" in family and is_matrix and "embed" not in name
        if is_matrix:
            assert all(is_mapped(part) != (is_turned or dtype == torch.float64) for part in parts), name
    assert ("lm_head.weight" in weights) == (not source.config.tie_word_embeddings)
    if "gpt" not in family:
        assert [part.shape for part in weights["model.layers.0.self_attn.qkv_proj.weight"]] == [
            (256, 256),
            (64, 256),
            (64, 256),
        ]
        assert [part.shape for part in weights["model.layers.0.mlp.gate_up_proj.weight"]] == [(512, 256)] * 2


@pytest.mark.parametrize("type_name", FORMATS)
@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_gguf_files(family: str, type_name: str, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = make_folder(family, tmp_path / "model", tiny_tokenizer)
    path = tmp_path / "model.gguf"
    convert_model(folder, path, type_name if type_name in GGUF_TYPES else "F16")
    if type_name not in GGUF_TYPES:
        path = in_format(path, tmp_path / "other.gguf", type_name)
    source = open_model(path)
    weights = assert_as_loaded(source)
    for name, parts in weights.items():
        if name.startswith("model.layers") and len(parts[0].shape) > 1:
            assert {part.storage for part in parts} == {KEPT.get(type_name, "f32")}
            for index, part in enumerate(parts):
                # Of Llama, rows of q and k are in another order; what cannot be kept is expanded.
                is_copied = (family == "llama" and "qkv" in name and index < 2) or type_name not in KEPT
                assert is_mapped(part) != is_copied, name
                if part.storage in ("q8_0", "q4_0", "q4_1"):
                    assert part.data.dtype == np.uint8
                    assert part.data.shape == (part.shape[0], FORMATS[type_name].num_bytes(part.shape[1:]))
    assert ("lm_head.weight" in weights) == (not source.config.tie_word_embeddings)


def test_the_model_of_a_package() -> None:
    weights = assert_as_loaded(open_model(locate("smollm2")))
    assert {part.storage for parts in weights.values() for part in parts} == {"q4_1", "q8_0", "f32"}


NO_TORCH = """
import sys
from pathlib import Path
import openbook.checkpoint.hub, openbook.checkpoint.memory, openbook.engine.load, openbook.engine.model
import openbook.engine.generate, openbook.engine.sampler, openbook.engine.transcript, openbook.checkpoint.key_maps
from openbook.checkpoint.locate import locate
from openbook.checkpoint.memory import require_memory
from openbook.checkpoint.model_source import open_model
from openbook.checkpoint.raw_weights import RawWeights
for name in sys.argv[1:]:
    source = open_model(locate(name))
    require_memory(source.path, source.config)
    assert source.config.num_hidden_layers > 0
    assert source.chat_template()
    ids, _ = source.chat().encode_prompt([{"role": "user", "content": "What is 2 + 3?"}], "medium", ())
    assert ids
    weights = RawWeights(source)
    assert sum(float(part.floats().sum()) for parts in weights.values() for part in parts) != 0
assert "torch" not in sys.modules, "torch was imported"
"""


def test_nothing_of_it_imports_torch(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    models = ["nano"]
    for family in GGUF_FAMILIES:
        folder = make_folder(family, tmp_path / family, tiny_tokenizer, torch.bfloat16)
        convert_model(folder, tmp_path / f"{family}.gguf", "Q4_0")
        models += [str(folder), str(tmp_path / f"{family}.gguf")]
    other = in_format(tmp_path / "llama.gguf", tmp_path / "other.gguf", "Q6_K")
    done = subprocess.run([sys.executable, "-c", NO_TORCH, *models, str(other)], capture_output=True, text=True)
    assert not done.returncode, done.stderr


# What does not fit is refused in one line.


def refusal(source: ModelSource, name: str = "") -> str:
    with pytest.raises(UserError) as caught:
        weights = RawWeights(source)
        for one in [name] if name else weights:
            weights[one]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def changed(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Any:
    """Saves a Qwen 3 in a folder with some of its tensors replaced; None removes one."""

    def change(**changes: torch.Tensor | None) -> ModelSource:
        folder = make_folder("qwen3", tmp_path / "model", tiny_tokenizer)
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        for name, tensor in changes.items():
            tensors.pop(name, None)
            if tensor is not None:
                tensors[name] = tensor
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        return open_model(folder)

    return change


@pytest.mark.parametrize(
    ("name", "shape", "ours"),
    [
        ("mlp.down_proj.weight", (512, 256), "mlp.down_proj.weight"),
        ("self_attn.q_norm.weight", (1,), "self_attn.q_norm.weight"),
        ("self_attn.q_norm.weight", (), "self_attn.q_norm.weight"),
        ("self_attn.o_proj.weight", (256, 256, 1), "self_attn.o_proj.weight"),
        ("input_layernorm.weight", (256, 1), "input_layernorm.weight"),
        ("self_attn.k_proj.weight", (65, 256), "self_attn.qkv_proj.weight"),
        ("self_attn.v_proj.weight", (64,), "self_attn.qkv_proj.weight"),
        ("mlp.up_proj.weight", (512, 257), "mlp.gate_up_proj.weight"),
    ],
)
def test_shapes_that_do_not_fit(changed: Any, name: str, shape: tuple[int, ...], ours: str) -> None:
    source = changed(**{f"model.layers.0.{name}": torch.zeros(shape)})
    message = refusal(source, f"model.layers.0.{ours}")
    assert message.startswith(f"the model {source.path}: model.layers.0.")
    assert str(list(shape)) in message
    assert message.endswith("weights and config.json do not belong together, fetch both again")


def test_names_that_do_not_fit(changed: Any) -> None:
    source = changed(**{"model.norm.weight": None})
    assert refusal(source) == (
        f"the model {source.path} lacks tensors model.norm.weight: weights and config.json do not belong together, "
        "fetch both again"
    )
    assert "has unknown tensors model.other.weight" in refusal(changed(**{"model.other.weight": torch.zeros(1)}))


def test_numbers_that_are_no_floats(changed: Any) -> None:
    source = changed(**{"model.norm.weight": torch.zeros(256, dtype=torch.int32)})
    assert refusal(source) == (
        f"the model {source.path}: model.norm.weight holds I32, expected one of F32, F16, BF16, F64: weights and "
        "config.json do not belong together, fetch both again"
    )


def test_a_tied_matrix_that_is_there_twice(changed: Any) -> None:
    source = changed()
    tied = msgspec.structs.replace(source.config, tie_word_embeddings=True)
    (source.path / "config.json").write_text(json.dumps(config_to_hf(tied)))
    embedding = source.tensors()["model.embed_tokens.weight"].clone()
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(open_model(source.path))
    source = changed(**{"lm_head.weight": embedding})
    (source.path / "config.json").write_text(json.dumps(config_to_hf(tied)))
    assert "lm_head.weight" not in assert_as_loaded(open_model(source.path))


def test_rows_that_no_heads_divide(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    convert_model(make_folder("llama", tmp_path / "model", tiny_tokenizer), tmp_path / "model.gguf", "Q8_0")
    file: GgufFile = read_gguf(tmp_path / "model.gguf")
    plans = [
        TensorPlan(name, (255, 256) if name == "blk.0.attn_q.weight" else tensor.shape, tensor.format)
        for name, tensor in file.tensors.items()
    ]
    data = [
        tensor.raw[: plan.format.num_bytes(plan.shape)]
        for plan, tensor in zip(plans, file.tensors.values(), strict=True)
    ]
    write_gguf(tmp_path / "other.gguf", file.metadata, plans, data)
    assert refusal(open_model(tmp_path / "other.gguf")) == (
        f"{tmp_path / 'other.gguf'}: model.layers.0.self_attn.q_proj.weight cannot be made of tensors of the shapes "
        "[255, 256]: fetch the file again"
    )


def test_other_families_have_none(tiny_tokenizer: Tokenizer, changed: Any) -> None:
    source = changed()
    values = json.loads((source.path / "config.json").read_text())
    values |= {"model_type": "qwen3_moe", "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    (source.path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="a model of the family qwen3_moe is not a dense decoder"):
        RawWeights(open_model(source.path))


def test_a_header_of_odd_length(changed: Any) -> None:
    """Old writers did not fill it up, so that floats stand at any byte."""
    path = changed().path / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    path.write_bytes(struct.pack("<Q", size + 1) + data[8 : 8 + size] + b" " + data[8 + size :])
    assert_as_loaded(open_model(path.parent))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "its header is damaged"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, "its header is damaged"),
        ({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, "its header is damaged"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "its header is damaged"),
        ({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, "its header is damaged"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, "its header is damaged"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}, "its header is damaged"),
        ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, "it ends before its tensors do"),
        ({"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}, "it goes on behind its tensors"),
        (
            {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"},
            "its tensors overlap or have gaps between them",
        ),
        (
            {"a": {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]}},
            "its tensors overlap or have gaps between them",
        ),
    ],
)
def test_damaged_headers(changed: Any, header: dict[str, Any], reason: str) -> None:
    source = changed()
    encoded = json.dumps(header).encode()
    path = source.path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(4))
    assert refusal(source) == (
        f"the weights {path} are not a whole safetensors file ({reason}): copy or download the file again"
    )
