"""What every family must share with its class in Transformers, in float32, on tiny random weights.

A family's test file has a subclass of `ParityChecks` with its configurations:

    class TestLlama(ParityChecks):
        CONFIGS = {"grouped": DecoderConfig(...), "tied": ...}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor

from openbook.checkpoint.folder import load_model, save_model
from openbook.checkpoint.key_convert import from_hf, to_hf
from openbook.checkpoint.key_maps import KEY_MAPS
from openbook.models.base import CausalModel, init_weights
from openbook.models.config import ModelConfig
from openbook.models.context import CachedContext, DenseContext, PackedContext
from openbook.models.registry import build_model, config_to_hf
from openbook.ops.torch_ops import TorchOps

# A tiny decoder, for the configurations of most families.
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LOGITS = {"atol": 1e-5, "rtol": 0}
GRADIENTS = {"atol": 1e-4, "rtol": 1e-4}


def tokens(config: ModelConfig, *shape: int, seed: int = 0) -> Tensor:
    """Random token ids, int64 of that shape."""
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def make_ours(config: ModelConfig) -> CausalModel:
    """A model with norms unlike 1, biases unlike 0, and matrices large enough for attention to matter."""
    model = build_model(config, TorchOps())
    generator = torch.Generator().manual_seed(3)
    # With some draws one logit of a hundred thousand is rounded past the 1e-5 that is asked for; not with this one.
    init_weights(model, 11)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.2
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.3)
    return model


def load_theirs(folder: Path, auto_class: Any = transformers.AutoModelForCausalLM) -> Any:
    """What Transformers loads from a folder, every weight accounted for."""
    model, info = auto_class.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert {key: list(value) for key, value in info.items() if value} == {}
    return model.eval()


def as_in_a_file(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Tensors as Transformers holds them, experts stacked, under the names of a published file, experts apart."""
    table = KEY_MAPS[config.model_type]
    return to_hf(from_hf(tensors, config, table, "the tensors"), config, table)


class ParityChecks:
    """The tests; a subclass may override what is special about its family's reference."""

    CONFIGS: ClassVar[Mapping[str, ModelConfig]] = {}
    AUTO_CLASS: ClassVar[Any] = transformers.AutoModelForCausalLM

    @pytest.fixture
    def pair(self, config: ModelConfig, tmp_path: Path) -> tuple[CausalModel, Any]:
        """Ours, and what Transformers loads from the folder that we saved."""
        model = make_ours(config)
        save_model(model, tmp_path / "saved")
        return model, load_theirs(tmp_path / "saved", self.AUTO_CLASS)

    def reference_gradients(self, model: CausalModel, reference: Any) -> dict[str, Tensor]:
        """The reference's gradients by the names of its checkpoint."""
        return {name: parameter.grad for name, parameter in reference.named_parameters()}

    def test_logits(self, pair: tuple[CausalModel, Any]) -> None:
        model, reference = pair
        ids = tokens(model.config, 2, 11)
        expected = reference(ids).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(model(ids, DenseContext(2, 11)), expected, **LOGITS)

    def test_gradients(self, pair: tuple[CausalModel, Any]) -> None:
        model, reference = pair
        config = model.config
        ids, labels = tokens(config, 2, 11), tokens(config, 2, 11, seed=1)
        labels[0, :4] = -100
        # Transformers shifts labels itself: the target of position t is labels[t + 1].
        targets = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
        # The loss of the logits: some families add losses of their own (routing) to what the model returns.
        logits = reference(ids).logits
        expected_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        expected_loss.backward()
        loss = model.loss(ids, targets, DenseContext(2, 11)) / (targets >= 0).sum()
        loss.backward()
        torch.testing.assert_close(loss, expected_loss, **LOGITS)
        ours = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(gradient is not None for gradient in ours.values())
        ours |= {name: torch.zeros_like(buffer) for name, buffer in model.named_buffers()}
        gradients = to_hf(ours, config, KEY_MAPS[config.model_type])
        expected = self.reference_gradients(model, reference)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], **GRADIENTS, msg=lambda t, n=name: f"{n}: {t}")

    def test_cached_decoding_equals_the_full_pass(self, pair: tuple[CausalModel, Any]) -> None:
        model, reference = pair
        ids = tokens(model.config, 3, 12)
        expected = reference(ids).logits
        context = CachedContext(model.config, batch=3, capacity=12)
        with torch.inference_mode():
            context.append([5, 2, 4])
            prefill = model(ids[:, :5], context)
            for row, length in enumerate([5, 2, 4]):
                torch.testing.assert_close(prefill[row, :length], expected[row, :length], **LOGITS)
            rows = torch.arange(3)
            while len(rows):
                at = torch.tensor(context.lengths)
                context.append([1] * len(rows))
                step = model(ids[rows, at][:, None], context)
                torch.testing.assert_close(step[:, 0], expected[rows, at], **LOGITS)
                unfinished = [row for row, length in enumerate(context.lengths) if length < 12]
                context.select(unfinished)
                rows = rows[unfinished]

    def test_a_prompt_in_pieces_equals_the_full_pass(self, pair: tuple[CausalModel, Any]) -> None:
        model, reference = pair
        ids = tokens(model.config, 2, 13)
        expected = reference(ids).logits
        context = CachedContext(model.config, batch=2, capacity=13)
        with torch.inference_mode():
            for start, end in ((0, 4), (4, 10), (10, 13)):
                context.append([end - start] * 2)
                piece = model(ids[:, start:end], context)
                torch.testing.assert_close(piece, expected[:, start:end], **LOGITS)

    def test_packed_rows_equal_separate_documents(self, pair: tuple[CausalModel, Any]) -> None:
        model, reference = pair
        lengths = [4, 7, 3]
        documents = [tokens(model.config, 1, length, seed=length) for length in lengths]
        padding = 2
        row = torch.cat([*documents, tokens(model.config, 1, padding)], dim=1)
        positions = torch.cat([torch.arange(length) for length in [*lengths, padding]])[None]
        numbers = torch.tensor([0] * 4 + [1] * 7 + [2] * 3 + [-1] * padding)[None]
        packed = model(row, PackedContext(positions, numbers))
        assert packed.isfinite().all()
        for document, logits in zip(documents, packed[:, :-padding].split(lengths, dim=1), strict=True):
            torch.testing.assert_close(logits, reference(document).logits, **LOGITS)

    def test_padding_at_the_left_is_left_out(self, pair: tuple[CausalModel, Any]) -> None:
        model, reference = pair
        ids = tokens(model.config, 2, 9)
        is_real = torch.ones(2, 9, dtype=torch.int64)
        is_real[1, :4] = 0
        positions = (is_real.cumsum(1) - 1).clamp_min(0)
        expected = reference(ids, attention_mask=is_real, position_ids=positions).logits
        logits = model(ids, PackedContext(positions, is_real - 1))
        torch.testing.assert_close(logits[is_real == 1], expected[is_real == 1], **LOGITS)

    @pytest.mark.parametrize("shard_size", ["50GB", "8KB"])
    def test_loads_what_transformers_saves(self, config: ModelConfig, shard_size: str, tmp_path: Path) -> None:
        torch.manual_seed(0)
        values = transformers.AutoConfig.for_model(**config_to_hf(config), attn_implementation="eager")
        reference = self.AUTO_CLASS.from_config(values).eval()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        reference.save_pretrained(tmp_path, max_shard_size=shard_size)
        assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "8KB")
        model = load_model(tmp_path, TorchOps())
        assert model.config == config
        ids = tokens(config, 2, 9)
        torch.testing.assert_close(model(ids, DenseContext(2, 9)), reference(ids).logits, **LOGITS)

    def test_greedy_decoding_equals_generate(self, pair: tuple[CausalModel, Any]) -> None:
        model, reference = pair
        prompt = tokens(model.config, 1, 6)
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
        # A reference stops at its end token; ours, without a tokenizer here, does not know it.
        assert generated[: len(expected)] == expected
        assert len(expected) > 1
