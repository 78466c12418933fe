"""Builds that were really trained, small enough to be trained again in a moment, and their releases."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from openbook.release.build import build

SMALL = """
name = "small"
description = "A recipe for tests."
license = "Apache-2.0"
seed = 7
precision = "float32"

[tokenizer]
vocab_size = 300
samples_per_task = 10

[model]
model_type = "qwen3"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 8
max_position_embeddings = 128

[data]
row_tokens = 128

[optimizer]
kind = "muon"

[[stages]]
name = "first"
documents = 30
steps = 7
global_batch_tokens = 256
checkpoint_steps = 3
schedule = { lr = 0.01, warmup_steps = 2, decay_share = 0.0 }
mixture = [{ task = "spell_backward", params = { max_word_len = 5 } }]

[[stages]]
name = "second"
documents = 40
steps = 4
global_batch_tokens = 256
checkpoint_steps = 2
schedule = { lr = 0.01, decay_share = 0.5 }
mixture = [{ task = "spell_backward", params = { max_word_len = 6 } }]

[eval]
tasks = ["spell_backward"]
samples = 2
max_tokens = 8
"""


@pytest.fixture(scope="session")
def small_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of the recipe above with its release, which ships all states; do not change it.

    Segments: steps 0 to 2, 3 to 5, 6; 7 to 8, 9 to 10.
    """
    return _build(tmp_path_factory.mktemp("small"), SMALL)


@pytest.fixture(scope="session")
def exact_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in the exact profile."""
    return _build(tmp_path_factory.mktemp("exact"), SMALL.replace("[tokenizer]", 'profile = "exact"\n\n[tokenizer]', 1))


def _build(folder: Path, recipe: str) -> Path:
    (folder / "small.toml").write_text(recipe)
    build(folder / "small.toml", folder / "build", threads=1, is_compiled=False, workers=1, keep_states=True)
    return folder / "build"


@pytest.fixture
def trained(small_build: Path, tmp_path: Path, one_process: None) -> Path:
    """A copy of the release of `small_build`, alone in its folder."""
    return Path(shutil.copytree(small_build / "release", tmp_path / "trained"))


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data are made in this process, which takes less time than to start others."""
    for module in ("openbook.verify.replay", "openbook.release.build"):
        monkeypatch.setattr(f"{module}.num_cores", lambda: 1)
