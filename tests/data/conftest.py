"""A small mixture, a tokenizer for it, and one stage's data."""

from __future__ import annotations

from pathlib import Path

import pytest

from openbook.data.corpus import sample_texts, write_stage_data
from openbook.data.mixture import MixtureEntry
from openbook.data.pack import DataConfig
from openbook.tokenizer.chat import Chat, default_template
from openbook.tokenizer.train import TokenizerConfig, train_tokenizer

ENTRIES = [
    MixtureEntry(task="spell_backward", efforts={"low": 1.0, "medium": 1.0}),
    MixtureEntry(task="chain_sum", weight=2.0, params={"max_terms": 3, "max_digits": 2}),
    MixtureEntry(task="gcd", params={"max_value": 60}, efforts={"high": 1.0}),
]
CONFIG = DataConfig(row_tokens=256, look_ahead=128, shard_rows=64)


@pytest.fixture(scope="session")
def entries() -> list[MixtureEntry]:
    return ENTRIES


@pytest.fixture(scope="session")
def chat() -> Chat:
    tokenizer = train_tokenizer(sample_texts(ENTRIES, 50, seed=1), TokenizerConfig())
    return Chat(tokenizer, default_template())


@pytest.fixture(scope="session")
def data_folder(chat: Chat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "main"
    write_stage_data(folder, "main", ENTRIES, 700, 5, chat, CONFIG, num_workers=1)
    return folder
