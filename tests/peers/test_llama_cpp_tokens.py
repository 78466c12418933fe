"""Token ids against llama.cpp's: on SmolLM2's file, and on the vocabularies that we write."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from gguf_files import smollm2
from gguf_vocabularies import LLAMA, SPLITS, trained
from nasty_texts import NASTY_TEXTS, nasty_text
from openbook.checkpoint.gguf_io import read_gguf, write_gguf
from openbook.tokenizer.gguf_vocab import gguf_from_definition, tokenizer_from_gguf
from openbook.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.peers

# llama.cpp writes these two patterns with a-z and A-Z for the classes of lower and upper case, and without those of
# combining marks; we keep the published ones.
SIMPLIFIED = {"tekken", "gpt-4o"}
# What llama.cpp asks of a file, vocabulary apart.
MODEL = {
    "general.architecture": "llama",
    "llama.context_length": 8,
    "llama.embedding_length": 8,
    "llama.block_count": 1,
    "llama.feed_forward_length": 8,
    "llama.attention.head_count": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def is_simple(char: str) -> bool:
    """Whether the simplified patterns take it for what it is."""
    category = unicodedata.category(char)
    return char.isascii() or not (category.startswith("M") or category in ("Lu", "Ll", "Lt"))


def assert_same_ids(path: Path, ours: Tokenizer, is_simplified: bool = False) -> None:
    from llama_cpp import Llama  # here, as the other tests are collected without it

    theirs = Llama(str(path), vocab_only=True, verbose=False)

    def check(text: str) -> None:
        # It finds user-defined tokens, such as the thinking marks, in any text; for us typed ones are text.
        text = text.replace("think>", "THINK>").replace("    ", "   ").replace("\0", "")
        if not is_simplified or all(map(is_simple, text)):
            assert ours.encode(text) == theirs.tokenize(text.encode(), add_bos=False, special=False), text

    for text in NASTY_TEXTS:
        check(text)
    settings(max_examples=100, deadline=None)(given(nasty_text)(check))()


def test_smollm2() -> None:
    assert_same_ids(smollm2(), tokenizer_from_gguf(read_gguf(smollm2()).metadata))


@pytest.mark.parametrize("name", SPLITS)
def test_byte_level_vocabularies_that_we_write(name: str, tmp_path: Path) -> None:
    ours = tokenizer_from_gguf(trained(name))
    write_gguf(tmp_path / "v.gguf", {**MODEL, **gguf_from_definition(ours)}, [], [])
    assert_same_ids(tmp_path / "v.gguf", ours, is_simplified=name in SIMPLIFIED)


@pytest.mark.parametrize("has_prefix", [True, False])
def test_a_sentencepiece_vocabulary_that_we_write(has_prefix: bool, tmp_path: Path) -> None:
    # After a user-defined token it puts a space, which SentencePiece does not.
    metadata: dict[str, Any] = {**LLAMA, "tokenizer.ggml.add_space_prefix": has_prefix}
    kept = [index for index, kind in enumerate(LLAMA["tokenizer.ggml.token_type"]) if kind != 4]
    for key in ("tokens", "scores", "token_type"):
        metadata[f"tokenizer.ggml.{key}"] = [LLAMA[f"tokenizer.ggml.{key}"][index] for index in kept]
    ours = tokenizer_from_gguf(metadata)
    write_gguf(tmp_path / "v.gguf", {**MODEL, **gguf_from_definition(ours)}, [], [])
    assert_same_ids(tmp_path / "v.gguf", ours)
