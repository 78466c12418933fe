"""Small models for all tests: one with random weights in a folder, and one that says what a test wants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from openbook.checkpoint.folder import save_model
from openbook.engine.choices import Profile
from openbook.engine.model import Model
from openbook.models.base import init_weights
from openbook.models.config import DecoderConfig
from openbook.models.registry import build_model
from openbook.ops.torch_ops import TorchOps
from openbook.tokenizer.chat import Chat, default_template
from openbook.tokenizer.tokenizer import Tokenizer
from openbook.tokenizer.train import TokenizerConfig, train_tokenizer

pytest_plugins = ["made_build", "made_seer", "small_build"]

TINY_CONTEXT = 160
TINY_RECIPE = """
[[stages]]
mixture = [{ task = "gcd", weight = 1.0 }, { task = "spell_backward", weight = 1.0 }]
[[stages]]
mixture = [{ task = "gcd", weight = 1.0 }, { task = "lcm", weight = 1.0 }]
"""


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """274 tokens: bytes, special tokens and merges for a few fixed words."""
    texts = [f"<|user|>What is {n} plus {7 * n}?<|assistant|>{8 * n}" for n in range(20)]
    return train_tokenizer({"add": texts}, TokenizerConfig(vocab_size=274, min_document_share=0.2))


@pytest.fixture(scope="session")
def tiny_folder(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release folder named `tiny`: Qwen 3, two layers, random weights, context of TINY_CONTEXT; do not change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = DecoderConfig(
        vocab_size=tiny_tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=TINY_CONTEXT,
        tie_word_embeddings=False,
        initializer_range=0.3,  # wide, so that greedy decoding does not repeat one token
    )
    model = build_model(config, TorchOps())
    init_weights(model, 1)
    save_model(model, folder)
    Chat(tiny_tokenizer, default_template()).save(folder)
    (folder / "provenance").mkdir()
    (folder / "provenance" / "recipe.toml").write_text(TINY_RECIPE)
    return folder


@pytest.fixture
def tiny_model(tiny_folder: Path) -> Model:
    """The model in `tiny_folder`, loaded."""
    return Model.load(tiny_folder)


class ScriptedRunner:
    """A runner that makes a model say `reply(prompt ids)`; afterwards it repeats its last token."""

    def __init__(self, reply: Callable[[list[int]], list[int]], vocab_size: int, max_model_len: int = 4096) -> None:
        self.reply, self.vocab_size, self.max_model_len = reply, vocab_size, max_model_len
        self.batch_sizes: list[int] = []
        self.profile: Profile = "fast"

    def start(self, num_sequences: int, num_tokens: int) -> ScriptedBatch:
        assert num_tokens <= self.max_model_len
        return ScriptedBatch(self)

    def logits(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.zeros((*token_ids.shape, self.vocab_size), dtype=np.float32)


class ScriptedBatch:
    def __init__(self, runner: ScriptedRunner) -> None:
        self._runner = runner
        self._replies: list[list[int]] = []
        self._num_said: list[int] = []

    def forward(self, token_ids: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float32]:
        self._runner.batch_sizes.append(len(counts))
        if not self._replies:
            self._replies = [self._runner.reply(row[:n].tolist()) for row, n in zip(token_ids, counts, strict=True)]
            self._num_said = [0] * len(counts)
        logits = np.zeros((len(counts), self._runner.vocab_size), dtype=np.float32)
        for row, reply in enumerate(self._replies):
            logits[row, reply[min(self._num_said[row], len(reply) - 1)]] = 5.0
            self._num_said[row] += 1
        return logits

    def keep(self, rows: NDArray[np.int64]) -> None:
        self._replies = [self._replies[row] for row in rows]
        self._num_said = [self._num_said[row] for row in rows]


@pytest.fixture
def scripted_model(tiny_tokenizer: Tokenizer, tiny_folder: Path) -> Callable[[Callable[[str], str]], Model]:
    """A maker of models that answer the text of a prompt (control tokens left out) with a text, then stop.

    `<think>`, `</think>` and `<|end|>` in the reply become control tokens.
    """
    chat = Chat(tiny_tokenizer, default_template())

    def speak(text: str) -> list[int]:
        pattern = tiny_tokenizer.control_pattern
        assert pattern is not None
        control = tiny_tokenizer.control_tokens
        parts = [[control[part]] if part in control else tiny_tokenizer.encode(part) for part in pattern.split(text)]
        return [token_id for part in parts for token_id in part]

    def make(reply: Callable[[str], str]) -> Model:
        def reply_ids(prompt_ids: list[int]) -> list[int]:
            return speak(reply(tiny_tokenizer.decode(prompt_ids, skip_special=True)) + "<|end|>")

        return Model("scripted", tiny_folder, ScriptedRunner(reply_ids, tiny_tokenizer.vocab_size), chat)

    return make
