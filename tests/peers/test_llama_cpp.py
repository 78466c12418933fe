"""What we write, in llama.cpp; what others wrote, in both. Building llama.cpp takes minutes: `make test-peers`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gguf_files import smollm2
from openbook.checkpoint.folder import load_model, save_model
from openbook.checkpoint.gguf_map import save_gguf
from openbook.checkpoint.locate import releases_dir
from openbook.checkpoint.model_source import open_model
from openbook.engine.model import Model
from openbook.models.base import CausalModel, init_weights
from openbook.models.config import DecoderConfig, ModelConfig, RopeScaling
from openbook.models.configs.gpt2 import GPT2Config
from openbook.models.context import DenseContext
from openbook.models.registry import build_model
from openbook.ops.torch_ops import TorchOps
from openbook.tokenizer.chat import Chat, default_template
from openbook.tokenizer.gguf_vocab import gguf_from_definition
from openbook.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama_cpp import Llama

pytestmark = pytest.mark.peers

NUM_PROMPTS = 20
_F32 = 0  # ggml_type of the cache: llama.cpp's default is F16
_SHAPE: dict[str, Any] = {
    "vocab_size": 280,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
_LLAMA3 = RopeScaling(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
_QWEN2 = {**_SHAPE, "model_type": "qwen2", "head_dim": 16}
CONFIGS: dict[str, ModelConfig] = {
    "llama": DecoderConfig(**_SHAPE, model_type="llama", tie_word_embeddings=False),
    "llama tied": DecoderConfig(**_SHAPE, model_type="llama", rope_theta=500000.0),
    "llama 3": DecoderConfig(**_SHAPE, model_type="llama", rope_scaling=_LLAMA3),
    "mistral": DecoderConfig(**_SHAPE, model_type="mistral", tie_word_embeddings=False),
    "qwen2": DecoderConfig(**_QWEN2, rope_theta=1e6),
    "qwen2 linear": DecoderConfig(**_QWEN2, rope_scaling=RopeScaling(rope_type="linear", factor=4.0)),
    "qwen2 yarn": DecoderConfig(
        **_QWEN2,
        rope_scaling=RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
    ),
    "qwen3": DecoderConfig(**_SHAPE, model_type="qwen3", tie_word_embeddings=False),
    "gpt2": GPT2Config(**{**_SHAPE, "num_key_value_heads": 4, "head_dim": 16}),
}


@contextmanager
def llama_cpp(path: Path, n_ctx: int = 256) -> Iterator[Llama]:
    """The model in llama.cpp, on one core, with a cache in float32."""
    from llama_cpp import Llama  # here, as the other tests are collected without it

    model = Llama(
        str(path),
        n_ctx=n_ctx,
        n_batch=n_ctx,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        flash_attn=False,
        type_k=_F32,
        type_v=_F32,
        verbose=False,
    )
    try:
        yield model
    finally:
        model.close()


def peer_logits(model: Llama, ids: Sequence[int]) -> NDArray[np.float32]:
    """float32 [T, V]."""
    model.reset()
    model.eval(list(ids))
    return np.array(model.scores[: len(ids)])


def peer_greedy(model: Llama, ids: Sequence[int], count: int) -> list[int]:
    model.reset()
    model.eval(list(ids))
    new: list[int] = []
    while len(new) < count:
        new.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(new[-1:])
    return new


@torch.no_grad()
def logits(model: CausalModel, ids: Sequence[int]) -> NDArray[np.float32]:
    """float32 [T, V]."""
    values: NDArray[np.float32] = model(torch.tensor([list(ids)]), DenseContext(1, len(ids)))[0].numpy()
    return values


def greedy(model: CausalModel, ids: Sequence[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logits(model, ids)[-1].argmax()))
    return ids[-count:]


def prompts(vocab_size: int) -> list[list[int]]:
    """Random ids, 1 to 48 of them."""
    random = np.random.default_rng(0)
    return [
        random.integers(0, vocab_size, 1 + 47 * index // (NUM_PROMPTS - 1)).tolist() for index in range(NUM_PROMPTS)
    ]


@pytest.fixture(scope="module")
def folders(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each of CONFIGS, with norms unlike 1 and biases unlike 0."""
    folders = {}
    for name, config in CONFIGS.items():
        model = build_model(config, TorchOps())
        generator = torch.Generator().manual_seed(1)
        init_weights(model, 1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        folders[name] = tmp_path_factory.mktemp("models") / name.replace(" ", "-")
        save_model(model, folders[name])
        Chat(tiny_tokenizer, default_template()).save(folders[name])
    return folders


def converted(folder: Path, path: Path, type_name: str) -> Path:
    source = open_model(folder)
    vocabulary = gguf_from_definition(source.tokenizer(), source.chat_template(), source.config.vocab_size)
    save_gguf(path, source.config_values, source.tensors(), vocabulary, type_name)
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_same_greedy_tokens(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    path = converted(folders[name], tmp_path / "model.gguf", "F32")
    ours = load_model(folders[name], TorchOps())
    with llama_cpp(path) as theirs:
        for ids in prompts(280):
            # Its gelu is a table of half floats.
            tolerance = 3e-3 if name == "gpt2" else 2e-4
            np.testing.assert_allclose(logits(ours, ids), peer_logits(theirs, ids), atol=tolerance, rtol=0)
            assert greedy(ours, ids, 24) == peer_greedy(theirs, ids, 24)


@pytest.mark.parametrize(("type_name", "tolerance"), [("F16", 0.02), ("BF16", 0.1), ("Q8_0", 0.1), ("Q4_0", 0.1)])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_every_type_is_understood_alike(
    name: str, type_name: str, tolerance: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    """llama.cpp rounds activations to the precision of the weights, we do not: hence the tolerance, of 1 std."""
    path = converted(folders[name], tmp_path / "model.gguf", type_name)
    ours = load_model(path, TorchOps())
    with llama_cpp(path) as theirs:
        for ids in prompts(280)[8:12]:
            mine, other = logits(ours, ids), peer_logits(theirs, ids)
            assert np.sqrt(((mine - other) ** 2).mean()) < tolerance * mine.std()


def test_nano(tmp_path: Path) -> None:
    """The model that we ship: the same tokens for the same text, and the same answers."""
    folder = releases_dir() / "nano"
    path = converted(folder, tmp_path / "nano.gguf", "F32")
    model = Model.load(folder)
    questions = [f"What is {17 * n} + {23 * n + 5}?" for n in range(1, NUM_PROMPTS + 1)]
    with llama_cpp(path, n_ctx=512) as theirs:
        for question in questions:
            ids = model.prompt_ids(question)
            text = model.tokenizer.decode(ids)
            assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ids
            answer = model.chat(question, temperature=0.0, max_tokens=32)
            count = len(answer.token_ids)
            assert peer_greedy(theirs, ids, count) == list(answer.token_ids)


# --- SmolLM2-135M-Instruct, Q4_1 -------------------------------------------------------------------------------------

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write a haiku about the sea.",
    "How many days are in a week?",
    "Explain gravity to a child.",
    "What do bees make?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "List five fruits.",
    "What is 12 times 3?",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What is the boiling point of water?",
    "Tell me a short joke.",
    "What is photosynthesis?",
    "Name a mammal that can fly.",
    "What is the largest planet?",
    "How does a bicycle stay upright?",
    "Write one sentence about winter.",
    "What is a prime number?",
)


@pytest.fixture(scope="module", params=["fast", "exact"])
def smol(request: pytest.FixtureRequest) -> Model:
    """Its weights expanded to float32, and as they are stored, with activations rounded to 8 bits as llama.cpp does."""
    return Model.load(smollm2(), profile=request.param)


@pytest.fixture(scope="module")
def answers(smol: Model) -> list[tuple[list[int], list[int]]]:
    """Prompt and greedy answer of ours, 32 tokens at most, for each question."""
    return [
        (smol.prompt_ids(question), list(smol.chat(question, temperature=0.0, max_tokens=32).token_ids))
        for question in QUESTIONS
    ]


def test_smollm2_has_the_same_prompts(smol: Model, answers: list[tuple[list[int], list[int]]]) -> None:
    with llama_cpp(smollm2()) as theirs:
        for ids, _ in answers:
            assert theirs.tokenize(smol.tokenizer.decode(ids).encode(), add_bos=False, special=True) == ids


@pytest.mark.parametrize("smol", ["fast"], indirect=True)
def test_smollm2_in_float32_answers_the_same(answers: list[tuple[list[int], list[int]]], tmp_path: Path) -> None:
    """The file's weights, expanded and written by us."""
    with llama_cpp(converted(smollm2(), tmp_path / "model.gguf", "F32")) as theirs:
        same = sum(peer_greedy(theirs, ids, len(answer)) == answer for ids, answer in answers)
    assert same >= 18


def test_smollm2_in_four_bits_differs_at_near_ties_only(answers: list[tuple[list[int], list[int]]]) -> None:
    """On Q4_1 llama.cpp rounds activations to 8 bits, and keys and values to 16: it then agrees with its own float32 in
    10 of these 20 answers, and with our exact profile, which rounds the same activations, in 9.

    So we compare where we part: what we choose is nearly what it would have chosen.
    """
    num_same, gaps = 0, []
    with llama_cpp(smollm2()) as theirs:
        for ids, answer in answers:
            peer = peer_greedy(theirs, ids, len(answer))
            if peer == answer:
                num_same += 1
                continue
            place = next(index for index, (ours, other) in enumerate(zip(answer, peer, strict=True)) if ours != other)
            last = peer_logits(theirs, ids + answer[:place])[-1]
            gaps.append(float(last.max() - last[answer[place]]) / float(last.std()))
    print(f"{num_same} of {len(answers)} answers are the same; gaps {gaps}")
    assert num_same >= 8
    assert max(gaps) < 0.25
