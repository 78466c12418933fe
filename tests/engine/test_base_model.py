"""A model without chat template continues a text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import openbook
from openbook.checkpoint.folder import save_model
from openbook.cli.main import main
from openbook.core.errors import UserError
from openbook.models.base import init_weights
from openbook.models.configs.gpt2 import GPT2Config
from openbook.models.registry import build_model
from openbook.ops.torch_ops import TorchOps


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A tiny GPT-2 with the tokenizer of our tiny model, and no template."""
    shutil.copy(tiny_folder / "tokenizer.json", tmp_path)
    shutil.copy(tiny_folder / "tokenizer_config.json", tmp_path)
    vocab_size = openbook.load(tiny_folder).tokenizer.vocab_size
    config = GPT2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=64,
    )
    model = build_model(config, TorchOps())
    init_weights(model, 1)
    save_model(model, tmp_path)
    return tmp_path


def test_it_continues_the_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = openbook.load(folder)
    assert model.is_base
    assert model.prompt_ids("1 + 1 <|user|>") == model.tokenizer.encode("1 + 1 <|user|>")
    answer = model.chat("1 + 1", max_tokens=5)
    assert answer.usage.prompt_tokens == len(model.tokenizer.encode("1 + 1"))
    ids = model.prompt_ids("1 + 1")
    for token in answer.token_ids:
        assert token == int(model.logits([ids])[0, -1].argmax())
        ids.append(token)
    assert main(["run", str(folder), "1 + 1", "--max-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert out.rstrip("\n") == answer.text.rstrip("\n")
    assert err.startswith(f"({folder.name} has no chat template: it continues the text)\n")


def test_it_holds_no_conversation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = openbook.load(folder)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(UserError, match=r"has no chat template: it continues one text, expected a prompt and no"):
        model.chat(turns)
    assert main(["chat", str(folder)]) == 2
    line = capsys.readouterr().err
    assert f"has no chat template, it continues texts: use `openbook run {folder} TEXT`" in line
    assert line.count("\n") == 1
