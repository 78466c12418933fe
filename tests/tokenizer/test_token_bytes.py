"""The bytes of tokens, for vocabularies of every kind, against what the tokenizer decodes."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from chat_families import family
from gguf_vocabularies import LLAMA, trained
from nasty_texts import NASTY_TEXTS
from openbook.checkpoint.locate import locate
from openbook.core.errors import UserError
from openbook.tokenizer.gguf_vocab import tokenizer_from_gguf
from openbook.tokenizer.token_bytes import drops_first_space, token_bytes
from openbook.tokenizer.tokenizer import Tokenizer


def metaspace() -> Tokenizer:
    """Like T5's: no bytes, and words that begin with a space."""
    library = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0), ("▁", -3.0)], unk_id=0))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(["<unk>"])
    return Tokenizer(library.to_str())


VOCABULARIES: dict[str, Callable[[], Tokenizer]] = {
    "nano": lambda: Tokenizer.load(locate("nano")),
    "bytes": lambda: family("qwen3").tokenizer,
    "GGUF, byte-level": lambda: tokenizer_from_gguf(trained("qwen2")),
    "GGUF, SentencePiece": lambda: tokenizer_from_gguf(LLAMA),
    "Metaspace": metaspace,
}


@pytest.fixture(scope="module", params=VOCABULARIES)
def vocabulary(request: pytest.FixtureRequest) -> tuple[Tokenizer, list[bytes]]:
    tokenizer = VOCABULARIES[request.param]()
    return tokenizer, token_bytes(tokenizer)


def test_every_token_has_bytes_but_those_that_steer(vocabulary: tuple[Tokenizer, list[bytes]]) -> None:
    tokenizer, found = vocabulary
    assert len(found) == tokenizer.vocab_size
    silent = {index for index, one in enumerate(found) if not one}
    assert set(tokenizer.control_tokens.values()) <= silent
    # nothing else is silent but ids that no token has
    vocabulary_of = json.loads(tokenizer.definition)["model"]["vocab"]
    named = set(vocabulary_of.values() if isinstance(vocabulary_of, dict) else range(len(vocabulary_of)))
    assert silent & named <= set(tokenizer.control_tokens.values())


@settings(max_examples=30)
@given(data=st.data())
def test_bytes_of_any_tokens_are_the_text_that_they_decode_to(
    vocabulary: tuple[Tokenizer, list[bytes]], data: st.DataObject
) -> None:
    tokenizer, found = vocabulary
    spoken = [index for index, one in enumerate(found) if one]
    ids = data.draw(st.lists(st.sampled_from(spoken), max_size=12))
    text = b"".join(found[index] for index in ids).decode("utf-8", "replace")
    if drops_first_space(tokenizer):
        text = text.removeprefix(" ")
    assert tokenizer.decode(ids) == text


def test_bytes_of_an_encoded_text_are_the_text(vocabulary: tuple[Tokenizer, list[bytes]]) -> None:
    tokenizer, found = vocabulary
    if len({one for one in found if len(one) == 1}) < 256:
        return  # not every text can be encoded
    for text in NASTY_TEXTS:
        if "▁" not in text:  # which SentencePiece writes for a space, and reads as one
            assert b"".join(found[index] for index in tokenizer.encode(text, "text")).decode() == text


def test_which_vocabularies_drop_a_space() -> None:
    dropping = {name for name, make in VOCABULARIES.items() if drops_first_space(make())}
    assert dropping == {"GGUF, SentencePiece", "Metaspace"}


def test_a_vocabulary_of_another_kind_is_one_line() -> None:
    library = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    library.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match=r"^the tokenizer decodes with WordPiece: expected a byte-level or a Sentence"):
        token_bytes(Tokenizer(library.to_str()))
