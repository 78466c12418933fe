from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from openbook.core.errors import UserError
from openbook.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer
from openbook.tokenizer.train import TokenizerConfig, train_tokenizer


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([index]) for index in tokenizer.encode(text)]


def test_fixed_words_are_one_token_and_changing_words_are_letters(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "Spell this word backward: queen7") == [
        *("S", "pell", " this", " word", " backward", ":", " ", "q", "u", "e", "e", "n", "7"),
    ]
    assert pieces(tokenizer, " → with one") == [" →", " with", " one"]


def test_no_token_beyond_what_the_fixed_words_need(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size < 256 + len(SPECIAL_TOKENS) + 60  # limit is 1024


def test_digits_and_capitals_stay_alone(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "1234") == ["1", "2", "3", "4"]
    assert pieces(tokenizer, " Number What SPELL")[:3] == [" ", "N", "umber"]
    for index in range(tokenizer.vocab_size - len(SPECIAL_TOKENS)):
        text = tokenizer.decode([index])
        assert len(text) == 1 or not any(c.isdigit() or c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for c in text)


def test_a_small_limit_keeps_the_most_used_words_whole(texts_by_task: dict[str, list[str]]) -> None:
    config = TokenizerConfig(vocab_size=256 + len(SPECIAL_TOKENS) + 6, min_document_share=0.2)
    small = train_tokenizer(texts_by_task, config)
    assert small.vocab_size <= config.vocab_size
    assert any(len(small.decode([index])) > 2 for index in range(256, 262))


def test_two_processes_train_the_same_bytes(texts_by_task: dict[str, list[str]], tmp_path: Path) -> None:
    script = (
        "import sys, msgspec\n"
        "from openbook.tokenizer.train import TokenizerConfig, train_tokenizer\n"
        "texts = msgspec.json.decode(open(sys.argv[1], 'rb').read())\n"
        "train_tokenizer(texts, TokenizerConfig()).save(sys.argv[2])\n"
    )
    (tmp_path / "texts.json").write_bytes(msgspec.json.encode(texts_by_task))
    for run in "12":
        environment = {**os.environ, "PYTHONHASHSEED": run, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", script, str(tmp_path / "texts.json"), str(tmp_path / run)]
        subprocess.run(command, check=True, env=environment)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_impossible_settings_are_one_line() -> None:
    with pytest.raises(UserError, match=r"^tokenizer.vocab_size is 200: it must be at least 266 \(256 bytes and"):
        train_tokenizer({}, TokenizerConfig(vocab_size=200))
    with pytest.raises(UserError, match=r"^tokenizer.min_document_share is 0.0: it must be above 0 and at most 1$"):
        train_tokenizer({}, TokenizerConfig(min_document_share=0.0))
