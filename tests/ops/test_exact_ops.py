"""ExactOps: whole models against TorchOps, the same bits on every path, in every batch and in any chunks."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal

import numpy as np
import pytest
import torch
from tiny_model import CONFIG
from torch import Tensor

import openbook.ops
from exact_paths import assert_same_on_all_paths, bits, native, normal
from openbook.core.errors import UserError
from openbook.models.base import CausalModel, init_weights
from openbook.models.config import DecoderConfig, ModelConfig, RopeScaling
from openbook.models.configs.deepseek import DeepseekV3Config
from openbook.models.configs.gpt2 import GPT2Config
from openbook.models.configs.gpt_oss import GptOssConfig
from openbook.models.configs.qwen_moe import Qwen2MoeConfig
from openbook.models.context import AttentionContext, CachedContext, DenseContext, PackedContext
from openbook.models.layers.rope import scale_frequencies
from openbook.models.registry import build_model
from openbook.models.rope_frequencies import exact_frequencies
from openbook.ops.exact_elementwise import exact_rope_tables
from openbook.ops.exact_ops import ExactOps
from openbook.ops.native_module import require_native
from openbook.ops.torch_ops import TorchOps

LLAMA3 = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=16, high_freq_factor=4.0)
YARN = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.1)
LINEAR = RopeScaling(rope_type="linear", factor=3.0)

SIZES = {name: getattr(CONFIG, name) for name in CONFIG.__struct_fields__ if name in ModelConfig.__struct_fields__}
del SIZES["model_type"]
EXPERTS = {**SIZES, "intermediate_size": 24, "num_experts_per_tok": 2}
CONFIGS: dict[str, ModelConfig] = {
    "llama": DecoderConfig(**SIZES, model_type="llama", rope_scaling=LLAMA3),
    "qwen3": DecoderConfig(**{**SIZES, "tie_word_embeddings": False}, model_type="qwen3", rope_scaling=YARN),
    "mistral": DecoderConfig(**SIZES, model_type="mistral", sliding_window=4),
    "gpt2": GPT2Config(**{**SIZES, "num_key_value_heads": 4}),
    "gpt_oss": GptOssConfig(
        **EXPERTS, num_local_experts=6, sliding_window=4, layer_types=("sliding_attention", "full_attention")
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **EXPERTS,
        num_experts=6,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        norm_topk_prob=True,
    ),
    "deepseek": DeepseekV3Config(
        **{**EXPERTS, "num_key_value_heads": 4},
        moe_intermediate_size=24,
        q_lora_rank=20,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=6,
        n_routed_experts=8,
        n_shared_experts=2,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
    ),
}
B, T = 2, 11
# Documents of 4 and 7 tokens; of 6 and 2, then padding.
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 0, 1, 0, 1, 2]])
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 7, [0] * 6 + [1] * 2 + [-1] * 3])
CONTEXTS: dict[str, Callable[[], AttentionContext]] = {
    "dense": lambda: DenseContext(B, T),
    "packed": lambda: PackedContext(POSITIONS, DOCUMENTS),
}


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def make(config: ModelConfig, ops: ExactOps | TorchOps) -> CausalModel:
    """Norms unlike 1 and biases unlike 0."""
    model = build_model(config, ops)
    init_weights(model, 1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def loss_and_gradients(model: CausalModel, context: AttentionContext) -> dict[str, Tensor]:
    targets = torch.where(DOCUMENTS < 0, -1, tokens(1))
    targets[0, :3] = -1
    model.zero_grad()
    loss = model.loss(tokens(), targets, context)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach(), **{name: grad.clone() for name, grad in found.items()}}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_agrees_with_torch(family: str, context: str) -> None:
    config = CONFIGS[family]
    ours = loss_and_gradients(make(config, ExactOps()), CONTEXTS[context]())
    theirs = loss_and_gradients(make(config, TorchOps()), CONTEXTS[context]())
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, expected in theirs.items():
        atol = 1e-4 * float(expected.abs().max()) + 1e-6
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_gives_the_same_bits_on_all_paths(family: str) -> None:
    model = make(CONFIGS[family], ExactOps())
    assert_same_on_all_paths(lambda: list(loss_and_gradients(model, CONTEXTS["packed"]()).values()))


@pytest.mark.parametrize("family", CONFIGS)
def test_neither_batch_nor_chunks_change_a_bit(family: str) -> None:
    model, ids = make(CONFIGS[family], ExactOps()), tokens()
    with torch.inference_mode():
        together = model(ids, DenseContext(B, T))
        assert bits(model(ids[1:], DenseContext(1, T))) == bits(together[1:])
        for cuts in ((0, 4, 5, 10, 11), (0, 11), range(12)):
            context = CachedContext(model.config, batch=B, capacity=T)
            pieces = []
            for begin, end in itertools.pairwise(cuts):
                context.append([end - begin] * B)
                pieces.append(model(ids[:, begin:end], context))
            assert bits(torch.cat(pieces, 1)) == bits(together), f"in pieces at {list(cuts)}"


def test_packed_documents_have_the_bits_of_separate_ones() -> None:
    model, ids = make(CONFIGS["qwen3"], ExactOps()), tokens()
    with torch.inference_mode():
        packed = model(ids, CONTEXTS["packed"]())
        for row, begin, end in ((0, 0, 4), (0, 4, 11), (1, 0, 6), (1, 6, 8)):
            alone = model(ids[row : row + 1, begin:end], DenseContext(1, end - begin))
            assert bits(alone[0]) == bits(packed[row, begin:end])


def test_wanted_tokens_alone_give_the_same_loss_bits_of_gradients() -> None:
    """The loss over some tokens adds up other rows in other lanes; the gradients of logits are the same."""
    model, targets = make(CONFIGS["llama"], ExactOps()), tokens(1)
    targets[:, ::2] = -1
    wanted = (targets.flatten() >= 0).nonzero().squeeze(1)
    found = []
    for trained in (None, wanted):
        model.zero_grad()
        model.loss(tokens(), targets, DenseContext(B, T), trained).backward()
        found.append([bits(parameter.grad) for parameter in model.parameters() if parameter.grad is not None])
    assert found[0] == found[1]


def test_frequencies() -> None:
    for dim, theta in ((64, 10_000.0), (6, 1_000_000.0), (128, 500_000.0)):
        frequencies, factor = exact_frequencies(dim, theta)
        assert factor == 1.0 and len(frequencies) == dim // 2
        assert frequencies == pytest.approx([theta ** (-2 * j / dim) for j in range(dim // 2)], rel=1e-14)
        for scaling in (LLAMA3, YARN, LINEAR):
            expected, expected_factor = scale_frequencies(
                torch.tensor(frequencies, dtype=torch.float64), theta, scaling
            )
            scaled, factor = exact_frequencies(dim, theta, scaling)
            assert scaled == pytest.approx(expected.tolist(), rel=1e-6)  # torch has YaRN's ramp in float32
            assert factor == pytest.approx(expected_factor, rel=1e-14)
    # To the last place, where float64 does not decide: 10000^(-1/32).
    third = Decimal(10_000).ln() * -2 / 64
    assert exact_frequencies(64, 10_000.0)[0][1] == float(third.exp())


def test_rope_tables_are_kept() -> None:
    ops, frequencies = ExactOps(), torch.tensor([1.0, 0.3, 0.01])
    for positions in (torch.tensor([[5, 0], [3, 3]]), torch.tensor([300, 7]), torch.tensor([1 << 17, 2]), POSITIONS):
        for kept, computed in zip(
            ops.rope_tables(positions, frequencies), exact_rope_tables(positions, frequencies), strict=True
        ):
            assert kept.shape == (*positions.shape, 3) and bits(kept) == bits(computed)


def test_equal_scores_are_chosen_in_their_order() -> None:
    ops = ExactOps()
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]])
    values, places = ops.top_k(scores, 3)
    assert values.tolist() == [[3.0, 3.0, 3.0]] and places.tolist() == [[1, 2, 4]]
    kept = ops.keep_groups(torch.arange(1.0, 9.0)[None], torch.tensor([[2.0, 2.0, 5.0, 2.0]]), 2, -1.0)
    assert kept.tolist() == [[1.0, 2.0, -1.0, -1.0, 5.0, 6.0, -1.0, -1.0]]


class Pieces:
    """Two matrices, given two rows at a time, as packed ones are."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def pieces(self, index: int, dtype: torch.dtype) -> list[Tensor]:
        return [piece.to(dtype) for piece in self.weight[index].split(2)]


def test_packed_matrices_give_the_bits_of_plain_ones() -> None:
    weight, ends = normal(3, 7, 5), torch.tensor([2, 2, 6])
    found = []
    for matrices in (weight, Pieces(weight)):
        x = normal(6, 5, seed=1).requires_grad_()
        out = ExactOps().grouped_linear(x, matrices, ends)
        out.backward(normal(6, 7, seed=2))
        found.append([bits(out), bits(x.grad)])
    assert found[0] == found[1]
    assert ExactOps().grouped_linear(normal(0, 5), Pieces(weight), torch.tensor([0, 0, 0])).shape == (0, 7)


def test_without_the_native_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(openbook.ops, "_native", raising=False)
    monkeypatch.setitem(sys.modules, "openbook.ops._native", None)
    with pytest.raises(UserError) as caught:
        ExactOps()
    message = str(caught.value)
    assert "installed without a C++ compiler" in message and "openbook.ops._native is missing" in message
    assert "install a C++ compiler (Debian: apt install g++), then pip install openbook again" in message
    assert "\n" not in message


def test_an_unknown_instruction_set_is_one_line() -> None:
    code = (
        "from openbook.core.errors import UserError\n"
        "from openbook.ops.native_module import require_native\n"
        "try:\n    require_native()\nexcept UserError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OPENBOOK_ISA": "mmx"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith('the environment variable OPENBOOK_ISA is "mmx", expected one that this CPU has: ')
    assert done.stdout.count("\n") == 1 and native.available_isas()[0] in done.stdout


def test_the_native_core_is_what_is_required() -> None:
    assert require_native() is native
    assert math.isclose(native.sum(np.ones(5, np.float32)), 5.0)
