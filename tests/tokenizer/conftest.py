"""One small tokenizer for all tokenizer tests."""

from __future__ import annotations

import pytest

from openbook.tokenizer.tokenizer import Tokenizer
from openbook.tokenizer.train import TokenizerConfig, train_tokenizer

WORDS = ["apple", "stone", "river", "cloud", "tiger", "lemon", "chair", "bread", "piano", "music", "horse", "queen"]


@pytest.fixture(scope="session")
def texts_by_task() -> dict[str, list[str]]:
    """Two tasks with fixed sentences around values that change."""
    words = [WORDS[n % len(WORDS)] for n in range(40)]
    return {
        "add": [f"<|user|>What is {n} + {7 * n}? Answer → with one Number.<|assistant|>{8 * n}" for n in range(40)],
        "spell": [f"<|user|>Spell this word backward: {word}<|assistant|>{word[::-1]}" for word in words],
    }


@pytest.fixture(scope="session")
def tokenizer(texts_by_task: dict[str, list[str]]) -> Tokenizer:
    return train_tokenizer(texts_by_task, TokenizerConfig(min_document_share=0.2))
