from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openbook.core.errors import UserError
from openbook.tokenizer.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer, require_match

NASTY = [
    "plain text",
    "Ünïcødé é é … 漢字 👩‍👩‍👧 \u200b\ufeff",
    " two  spaces\n\n\ttab\r\n end \n",
    "don't WE'LL 12345 3.14 -7 ½",
    "\x00\x01 null",
    "What is 1 + 1? → Number.",
]


@given(st.text())
def test_round_trip_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


plain_text = st.text(st.characters(max_codepoint=127) | st.characters(categories=["P", "S"])) | st.lists(
    st.sampled_from(["'", "s", "S", "'LL", " ", "\n", "\r", "\t", "\x0b", "\x1c", "\x85", "1", "-", "ab", "A", "_"])
).map("".join)


@given(plain_text)
@example("→ ×1 a…b “c” 5€\n")
def test_words_from_the_cache_equal_the_library(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer._words is not None
    assert tokenizer._words.encode(text) == tokenizer._text.encode(text, add_special_tokens=False).ids


@given(st.lists(st.text()))
def test_a_batch_equals_one_by_one(tokenizer: Tokenizer, texts: list[str]) -> None:
    library = [tokenizer._text.encode(text, add_special_tokens=False).ids for text in texts]
    assert tokenizer.encode_batch(texts) == library == [tokenizer.encode(text) for text in texts]


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "<", "|>", "a", " "])).map("".join))
def test_control_tokens_typed_by_a_user_stay_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.control_tokens.values())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]


@pytest.mark.parametrize("with_model_config", [False, True])
def test_same_ids_as_auto_tokenizer(tokenizer: Tokenizer, tmp_path: Path, with_model_config: bool) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    if with_model_config:
        (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in NASTY:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert theirs.encode(text) == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == tokenizer.special_id("<|end|>")
    assert theirs.pad_token_id == tokenizer.special_id("<|endoftext|>") == tokenizer.pad_id
    spoken = "<think>2</think>3<|end|>"
    assert theirs.decode(theirs.encode(spoken), skip_special_tokens=True) == "<think>2</think>3"


def test_save_load_and_pickle_keep_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for copy in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.encode(NASTY[1]) == tokenizer.encode(NASTY[1])
        assert copy.control_tokens == tokenizer.control_tokens
        assert copy.stop_ids == tokenizer.stop_ids == {tokenizer.special_id("<|end|>")}


def test_stop_ids_of_a_generation_config_count_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert Tokenizer.load(tmp_path).stop_ids == {5, 6, tokenizer.special_id("<|end|>")}


@given(st.text(), st.integers(1, 4))
def test_stream_decoder_gives_whole_characters(tokenizer: Tokenizer, text: str, size: int) -> None:
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode(text)
    pieces = [decoder.feed(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert "".join(pieces) + decoder.flush() == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_stream_decoder_flushes_a_broken_character(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode("é")[:1]
    assert decoder.feed(ids) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.feed(tokenizer.encode("ok")) == "ok"


def test_decode_can_leave_out_control_tokens(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.special_id("<think>"), *tokenizer.encode("2"), tokenizer.special_id("<|end|>")]
    assert tokenizer.decode(ids) == "<think>2<|end|>"
    assert tokenizer.decode(ids, skip_special=True) == "2"


def test_errors_are_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^cannot read the tokenizer .*json: No such file.*; check the path$"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    for broken in (whole[:-40], "{}", "[]", '{"model": {"type": "BPE"}}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(UserError, match=r"^.*tokenizer.json is corrupt \(.*\): restore it from its source"):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"tokenizer.json is corrupt \(not UTF-8\): restore it"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match=r"^the tokenizer has no special token <\|im_end\|> \(it has <\|endoftext\|>, "):
        tokenizer.special_id("<|im_end|>")
    with pytest.raises(UserError, match=r"^token id 99999 is outside the vocabulary of \d+: wrong tokenizer\?$"):
        tokenizer.decode([1, 99999])


def test_wrong_tokenizer_for_a_model_is_one_line(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    require_match(tokenizer, size)
    require_match(tokenizer, size + 500)  # a padded vocabulary
    for wrong in (size - 1, 151_936):
        with pytest.raises(UserError, match=rf"^wrong tokenizer: it has {size} tokens and the model has {wrong}: use"):
            require_match(tokenizer, wrong)


def test_saved_files_name_no_place(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|end|>"
