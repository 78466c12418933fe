"""Matrices laid out for decoding give the same bits, and everything but products still finds its plain ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openbook.engine.decode_layout import lay_out_for_decoding
from openbook.engine.torch_runner import TorchRunner
from openbook.models.base import CausalModel, init_weights
from openbook.models.context import DenseContext
from openbook.models.layers.linear import Linear
from openbook.models.layers.moe import Experts
from openbook.models.registry import build_model, config_from_hf
from openbook.ops.blocked import BlockedMatrices, can_be_blocked
from openbook.ops.torch_ops import TorchOps

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
MODELS = {
    "tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "untied": {"model_type": "llama", "tie_word_embeddings": False},
    "with biases": {"model_type": "qwen2", "tie_word_embeddings": True},
    "experts": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
}

pytestmark = pytest.mark.skipif(
    not can_be_blocked(torch.empty(2, 2, dtype=torch.bfloat16)), reason="this CPU multiplies no bfloat16 in oneDNN"
)


def make(name: str, dtype: torch.dtype = torch.bfloat16) -> CausalModel:
    model = build_model(config_from_hf({**SIZES, **MODELS[name]}, name), TorchOps())
    init_weights(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0) if parameter.dim() > 1 else parameter.add_(0.1)
    return model.to(dtype)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
@torch.inference_mode()
def test_same_bits(name: str, num_tokens: int) -> None:
    model = make(name)
    ids = torch.randint(0, 97, (3, num_tokens), generator=torch.Generator().manual_seed(2))
    expected = model(ids, DenseContext(3, num_tokens))
    lay_out_for_decoding(model)
    matrices = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(matrices) >= 4
    assert all(module.weight.layout != torch.strided for module in matrices)
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    assert len(experts) == (2 if name == "experts" else 0)
    assert all(isinstance(module.down_proj, BlockedMatrices) for module in experts)
    assert torch.equal(model(ids, DenseContext(3, num_tokens)), expected)


def test_a_runner_lays_out_once_it_decodes() -> None:
    plain, runner = make("tied"), TorchRunner(make("tied"))
    batch = runner.start(2, 10)
    ids = np.array([[5, 6, 7], [8, 9, 9]])
    batch.forward(ids, np.array([3, 2]))
    assert not runner._is_laid_out
    logits = batch.forward(np.array([[11], [12]]), np.array([1, 1]))
    assert runner._is_laid_out
    with torch.inference_mode():
        whole = plain(torch.tensor([[5, 6, 7, 11]]), DenseContext(1, 4))[0, -1].float().numpy()
    np.testing.assert_allclose(logits[0], whole, atol=0.03 * np.abs(whole).max())


def test_other_models_stay_as_they_are() -> None:
    model = make("tied", torch.float32)
    lay_out_for_decoding(model)
    assert all(parameter.layout == torch.strided for parameter in model.parameters())
    assert model.blocked_output_weight is None
