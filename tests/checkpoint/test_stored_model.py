"""Quantised models: the native runner, and the same file through the exact Ops, agree to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from exact_paths import paths
from openbook.checkpoint.gguf_map import save_gguf
from openbook.checkpoint.key_convert import to_hf
from openbook.checkpoint.key_maps import KEY_MAPS
from openbook.checkpoint.model_source import open_model
from openbook.checkpoint.stored_model import load_stored_model
from openbook.core.errors import UserError
from openbook.engine.choices import CACHE_KINDS, CacheKind
from openbook.engine.native_load import load_native
from openbook.engine.torch_runner import load_exact_runner
from openbook.models.base import init_weights
from openbook.models.config import DecoderConfig
from openbook.models.context import DenseContext
from openbook.models.registry import build_model, config_to_hf
from openbook.ops.exact_ops import ExactOps
from openbook.ops.exact_quant import QuantMatrix
from openbook.ops.torch_ops import TorchOps

CONFIG = DecoderConfig(
    model_type="llama",
    vocab_size=97,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=128,
    initializer_range=0.3,
)
IDS = np.random.default_rng(0).integers(0, 97, (2, 80))  # enough for chunks of rows


@pytest.fixture(scope="module", params=["Q8_0", "Q4_0"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build_model(CONFIG, TorchOps())
    init_weights(model, 3)
    file = tmp_path_factory.mktemp("stored") / "model.gguf"
    tensors = to_hf(model.state_dict(), CONFIG, KEY_MAPS["llama"])
    save_gguf(file, config_to_hf(CONFIG), tensors, {}, request.param)
    return file


@pytest.mark.parametrize("cache", CACHE_KINDS)
def test_the_native_runner_agrees_to_the_bit(path: Path, cache: CacheKind) -> None:
    runners = load_native(open_model(path), cache), load_exact_runner(open_model(path), cache)
    found = [runner.logits(IDS).tobytes() for runner in runners]
    batches = [runner.start(2, 96) for runner in runners]
    found += [batch.forward(IDS, np.array([80, 7])).tobytes() for batch in batches]
    for step in range(3):
        ids, counts = IDS[:, step : step + 1], np.ones(2, np.int64)
        found += [batch.forward(ids, counts).tobytes() for batch in batches]
    assert found[::2] == found[1::2]
    assert len(set(found)) == 5


@pytest.mark.parametrize("cache", CACHE_KINDS)
def test_every_instruction_set_and_thread_count(path: Path, cache: CacheKind) -> None:
    found = {load_native(open_model(path), cache).logits(IDS).tobytes() for _ in paths()}
    assert len(found) == 1


def test_matrices_stay_quantised_and_logits_near_those_of_the_expanded_weights(path: Path) -> None:
    model = load_stored_model(open_model(path), ExactOps())
    matrices = [getattr(module, "weight", None) for module in model.modules()]
    assert sum(isinstance(weight, QuantMatrix) for weight in matrices) == 1 + 4 * CONFIG.num_hidden_layers
    ids = torch.from_numpy(IDS)
    with torch.no_grad():
        quantised = model(ids, DenseContext(2, 80))
        plain = build_model(CONFIG, TorchOps())
        tensors = open_model(path).tensors()
        plain.load_state_dict({name: tensors_of(name, tensors) for name in plain.state_dict()})
        expanded = plain(ids, DenseContext(2, 80))
    error = (quantised - expanded).norm() / expanded.norm()
    assert 0 < error < 0.03  # activations in 8 bits


def tensors_of(name: str, tensors: object) -> torch.Tensor:
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for ours, theirs in parts.items():
        if ours in name:
            return torch.cat([tensors[name.replace(ours, their)] for their in theirs])  # type: ignore[index]
    return tensors[name]  # type: ignore[index, no-any-return]


def test_loss_and_messages(path: Path) -> None:
    model = load_stored_model(open_model(path), ExactOps())
    ids, context = torch.from_numpy(IDS), DenseContext(2, 80)
    targets = ids.roll(-1, 1)
    with torch.no_grad():
        logits = model(ids, context).flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits.double(), targets.flatten(), reduction="sum")
        torch.testing.assert_close(model.loss(ids, targets, context).double(), expected, rtol=1e-5, atol=0)
    weight: object = model.output_weight
    assert isinstance(weight, QuantMatrix)
    ops = ExactOps()
    with pytest.raises(UserError, match=r"a gradient was asked for through a matrix in Q8_0, which is for inference"):
        ops.linear(torch.zeros(1, 64, requires_grad=True), weight)
    with pytest.raises(UserError, match=r"x has shape \[1, 32\] on cpu and weight \[97, 64\]: expected \[..., K\]"):
        ops.linear(torch.zeros(1, 32), weight)
    with pytest.raises(UserError, match=r"ids are torch\.int32 on cpu, expected torch\.int64"):
        ops.embedding(torch.zeros(1, dtype=torch.int32), weight)
