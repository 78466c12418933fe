"""Our Qwen 3 against Transformers' Qwen3ForCausalLM, in float32, on tiny random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from openbook.checkpoint.folder import load_model, save_model
from openbook.checkpoint.key_map import to_hf
from openbook.models.base import CausalModel, init_weights
from openbook.models.config import ModelConfig
from openbook.models.context import CachedContext, DenseContext, PackedContext
from openbook.models.registry import build_model, config_to_hf
from openbook.ops.torch_ops import TorchOps

BASE = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
SHAPES = {
    "grouped-tied": {},
    "untied": {"tie_word_embeddings": False},
    "one-kv-head": {"num_key_value_heads": 1},
    "no-groups": {"num_key_value_heads": 4},
    "wide-heads": {"head_dim": 16, "rope_theta": 1_000_000.0},
    "narrow-heads-eps": {"head_dim": 6, "rms_norm_eps": 1e-3},
}


def shaped(name: str) -> ModelConfig:
    fields = {field: getattr(BASE, field) for field in BASE.__struct_fields__}
    return ModelConfig(**{**fields, **SHAPES[name]})


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, BASE.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def ours(config: ModelConfig) -> CausalModel:
    """A model with norms unlike 1 and matrices large enough for attention to matter."""
    model = build_model(config, TorchOps())
    generator = torch.Generator().manual_seed(3)
    init_weights(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.2
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def theirs(folder: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert {key: list(value) for key, value in info.items() if value} == {}
    return model.eval()


@pytest.fixture(params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[CausalModel, Any]:
    """Ours, and what Transformers loads from the folder that we saved."""
    model = ours(shaped(request.param))
    save_model(model, tmp_path / "saved")
    return model, theirs(tmp_path / "saved")


def test_logits(pair: tuple[CausalModel, Any]) -> None:
    model, reference = pair
    ids = tokens(2, 11)
    expected = reference(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(model(ids, DenseContext(2, 11)), expected, atol=1e-5, rtol=0)


def test_gradients(pair: tuple[CausalModel, Any]) -> None:
    model, reference = pair
    ids, labels = tokens(2, 11), tokens(2, 11, seed=1)
    labels[0, :4] = -100
    # Transformers shifts labels itself: the target of position t is labels[t + 1].
    targets = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
    expected_loss = reference(ids, labels=labels).loss
    expected_loss.backward()
    loss = model.loss(ids, targets, DenseContext(2, 11)) / (targets >= 0).sum()
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=0)
    gradients = to_hf({name: parameter.grad for name, parameter in model.named_parameters()}, model.config)
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4, msg=lambda t, n=name: f"{n}: {t}")


def test_cached_decoding_equals_the_full_pass(pair: tuple[CausalModel, Any]) -> None:
    model, reference = pair
    ids = tokens(3, 12)
    expected = reference(ids).logits
    context = CachedContext(model.config, batch=3, capacity=12)
    with torch.inference_mode():
        context.append([5, 2, 4])
        prefill = model(ids[:, :5], context)
        for row, length in enumerate([5, 2, 4]):
            torch.testing.assert_close(prefill[row, :length], expected[row, :length], atol=1e-5, rtol=0)
        rows = torch.arange(3)
        while len(rows):
            at = torch.tensor(context.lengths)
            context.append([1] * len(rows))
            step = model(ids[rows, at][:, None], context)
            torch.testing.assert_close(step[:, 0], expected[rows, at], atol=1e-5, rtol=0)
            unfinished = [row for row, length in enumerate(context.lengths) if length < 12]
            context.select(unfinished)
            rows = rows[unfinished]


def test_packed_rows_equal_separate_documents(pair: tuple[CausalModel, Any]) -> None:
    model, reference = pair
    lengths = [4, 7, 3]
    documents = [tokens(1, length, seed=length) for length in lengths]
    padding = 2
    row = torch.cat([*documents, tokens(1, padding)], dim=1)
    positions = torch.cat([torch.arange(length) for length in [*lengths, padding]])[None]
    numbers = torch.tensor([0] * 4 + [1] * 7 + [2] * 3 + [-1] * padding)[None]
    packed = model(row, PackedContext(positions, numbers))
    assert packed.isfinite().all()
    for document, logits in zip(documents, packed[:, :-padding].split(lengths, dim=1), strict=True):
        torch.testing.assert_close(logits, reference(document).logits, atol=1e-5, rtol=0)


def test_padding_at_the_left_is_left_out(pair: tuple[CausalModel, Any]) -> None:
    model, reference = pair
    ids = tokens(2, 9)
    is_real = torch.ones(2, 9, dtype=torch.int64)
    is_real[1, :4] = 0
    positions = (is_real.cumsum(1) - 1).clamp_min(0)
    expected = reference(ids, attention_mask=is_real, position_ids=positions).logits
    logits = model(ids, PackedContext(positions, is_real - 1))
    torch.testing.assert_close(logits[is_real == 1], expected[is_real == 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", ["grouped-tied", "untied"])
@pytest.mark.parametrize("shard_size", ["50GB", "8KB"])
def test_loads_what_transformers_saves(shape: str, shard_size: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = config_to_hf(shaped(shape))
    reference = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**values)).eval()
    reference.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "8KB")
    model = load_model(tmp_path, TorchOps())
    ids = tokens(2, 9)
    torch.testing.assert_close(model(ids, DenseContext(2, 9)), reference(ids).logits, atol=1e-5, rtol=0)


def test_greedy_decoding_equals_generate(pair: tuple[CausalModel, Any]) -> None:
    model, reference = pair
    prompt = tokens(1, 6)
    whole = torch.ones_like(prompt)
    expected = reference.generate(prompt, attention_mask=whole, max_new_tokens=10, do_sample=False, pad_token_id=0)
    expected = expected[0, 6:].tolist()
    context = CachedContext(model.config, batch=1, capacity=16)
    next_ids, generated = prompt, []
    with torch.inference_mode():
        while len(generated) < 10:
            context.append([next_ids.shape[1]])
            next_ids = model(next_ids, context)[:, -1:].argmax(-1)
            generated.append(int(next_ids))
    assert generated == expected
