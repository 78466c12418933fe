"""Text to token ids and back, for our models and for any Hugging Face folder with a tokenizer.json."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from openbook.core.errors import UserError, one_line
from openbook.core.files import read_bytes, read_json, write_bytes, write_json
from openbook.tokenizer.definition import (
    Follows,
    byte_decoder,
    check_definition,
    is_control,
    leading_space,
    start_ids,
    without_control_tokens,
)
from openbook.tokenizer.patterns import QWEN2_PATTERN
from openbook.tokenizer.sentencepiece_model import SentencePieceModel

PAD, END = "<|endoftext|>", "<|end|>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
EFFORT_TOKENS = ("<|low|>", "<|medium|>", "<|high|>")
# In the order of their ids, which follow the bytes and the merges.
SPECIAL_TOKENS = (PAD, *ROLE_TOKENS, END, *EFFORT_TOKENS, THINK_OPEN, THINK_CLOSE)

# A vocabulary may be padded for speed; the widest padding seen in a published model is 1,069 ids (gpt-oss).
MAX_UNUSED_IDS = 2048

_SENTENCEPIECE_FILE = "tokenizer.model"
_BPE_KEYS = frozenset(
    """
    vocab merges dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk byte_fallback ignore_merges
    """.split()  # noqa: SIM905
)
_FIX = "restore it from its source, or name a folder with a whole tokenizer"


class Tokenizer:
    """A byte-exact tokenizer. Text is always text: what a user types never becomes a control token.

    Args:
        definition: the text of a tokenizer.json, or its values.
        config: the values of tokenizer_config.json (`eos_token`, `bos_token`, `chat_template`, ...).
        extra_stop_ids: ids that end an answer beside `eos_token`.

    Raises:
        UserError: the definition is not one that the tokenizers library reads.
    """

    def __init__(
        self,
        definition: str | dict[str, Any],
        config: dict[str, Any] | None = None,
        extra_stop_ids: Iterable[int] = (),
    ) -> None:
        self.config = dict(config or {})
        self._given = definition
        self._extra_stop_ids = tuple(extra_stop_ids)
        try:
            values = msgspec.json.decode(definition) if isinstance(definition, str) else definition
            check_definition(values)
            self._space = leading_space(values, self.config)
            text_values = without_control_tokens(values, self._space is not None)
            model = _byte_pairs(values["model"])
            self._full = _library(values, model)
            is_shared = text_values["model"] is values["model"]
            self._text = _library(text_values, model if is_shared else _byte_pairs(text_values["model"]))
            self._before_model = values.get("normalizer"), values.get("pre_tokenizer")
            self._start_ids = start_ids(values)
            self._byte_decoder = byte_decoder(values, self._full.get_vocab)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the library raises plain Exception, and panics beside it
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"the tokenizer.json is corrupt ({reason}): {_FIX}") from error
        self.control_tokens: dict[str, int] = {
            token.content: index
            for index, token in sorted(self._full.get_added_tokens_decoder().items())
            if is_control(token.content, token.special)
        }

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read tokenizer.json, or a SentencePiece tokenizer.model where there is none.

        tokenizer_config.json (with added_tokens.json) and generation_config.json (stop ids) are read where they stand.

        Raises:
            UserError: the tokenizer is missing or corrupt.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        config = _read_config(folder)
        if path.exists() or not (folder / _SENTENCEPIECE_FILE).exists():
            definition = _read_text(path)
        else:
            path = folder / _SENTENCEPIECE_FILE
            model = SentencePieceModel.parse(read_bytes(path, "tokenizer"), str(path))
            model = model.with_added(_added_tokens(folder, config))
            definition, config = model.definition(), {**model.config(), **config}
        stops = _read_optional(folder / "generation_config.json").get("eos_token_id")
        stop_ids = stops if isinstance(stops, list) else [] if stops is None else [stops]
        if not all(isinstance(index, int) for index in stop_ids):
            where = folder / "generation_config.json"
            raise UserError(f"{where}: eos_token_id is {stops!r}, expected a token id or a list of them: {_FIX}")
        try:
            return cls(definition, config, stop_ids)
        except UserError as error:
            raise UserError(str(error).replace("the tokenizer.json", str(path))) from error

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json and tokenizer_config.json; Transformers' AutoTokenizer reads both as they are."""
        folder = Path(folder)
        write_bytes(folder / "tokenizer.json", self.definition.encode())
        write_json(folder / "tokenizer_config.json", self.config)

    @cached_property
    def definition(self) -> str:
        """The text of its tokenizer.json."""
        return self._given if isinstance(self._given, str) else msgspec.json.encode(self._given).decode()

    @cached_property
    def _words(self) -> _WordCache | None:
        normalizer, splits = self._before_model
        is_known = normalizer is None and splits == _pre_tokenizer_values()
        return _WordCache(self._text) if is_known and not self._text.get_added_tokens_decoder() else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.definition, self.config, self._extra_stop_ids)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self._full.get_vocab(with_added_tokens=True).values()) + 1

    def texts(self) -> dict[int, str]:
        """The tokens by their ids, as tokenizer.json writes them, control tokens included."""
        return {index: text for text, index in self._full.get_vocab(with_added_tokens=True).items()}

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        eos = self._config_token("eos_token")
        known = () if eos is None else (self._full.token_to_id(eos),)
        return frozenset(index for index in (*known, *self._extra_stop_ids) if index is not None)

    @cached_property
    def start_ids(self) -> tuple[int, ...]:
        """Ids that stand before a plain text (not a conversation, whose template writes them): `bos_token` or none.

        tokenizer_config.json's `add_bos_token` decides, else the tokenizer.json itself.
        """
        bos = self._config_token("bos_token")
        index = None if bos is None else self._full.token_to_id(bos)
        if isinstance(self.config.get("add_bos_token"), bool):
            return (index,) if self.config["add_bos_token"] and index is not None else ()
        return self._start_ids

    @cached_property
    def pad_id(self) -> int:
        """The id that fills rows; 0 where the tokenizer has none."""
        pad = self._config_token("pad_token")
        index = None if pad is None else self._full.token_to_id(pad)
        return 0 if index is None else index

    def special_id(self, name: str) -> int:
        """The id of a control token by its text, such as "<|end|>".

        Raises:
            UserError: this tokenizer has no such control token.
        """
        if name not in self.control_tokens:
            known = ", ".join(self.control_tokens) or "none"
            raise UserError(f"the tokenizer has no special token {name} (it has {known[:200]}): wrong tokenizer?")
        return self.control_tokens[name]

    def encode(self, text: str, follows: Follows = "nothing") -> list[int]:
        """Token ids of plain text; a control token written in it is text like any other.

        Args:
            follows: what the text comes after, a control token or text. SentencePiece families put a space before a
                first text, most of them also after a control token, none after text.
        """
        if self._space is not None:
            text = self._space.put(text, follows)
        if self._words is not None and _is_plain(text):
            return self._words.encode(text)
        ids: list[int] = self._text.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str], follows: Follows = "nothing") -> list[list[int]]:
        """`encode` of many texts, faster than one by one."""
        if self._space is not None:
            texts = [self._space.put(text, follows) for text in texts]
        words = self._words
        others = [text for text in texts if words is None or not _is_plain(text)]
        encoded = iter(self._text.encode_batch_fast(others, add_special_tokens=False))
        return [words.encode(text) if words and _is_plain(text) else next(encoded).ids for text in texts]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of ids. Bytes that are no UTF-8 become U+FFFD.

        Args:
            skip_special: leave out every control token, thinking marks included.

        Raises:
            UserError: an id is not in the vocabulary.
        """
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(index for index in ids if not 0 <= index < self.vocab_size)
            raise UserError(f"token id {wrong} is outside the vocabulary of {self.vocab_size}: wrong tokenizer?")
        if skip_special:
            control = self._control_ids
            ids = [index for index in ids if index not in control]
        if self._byte_decoder is not None:
            return self._byte_decoder.decode(ids)
        text: str = self._full.decode(ids, skip_special_tokens=False)
        return text

    @cached_property
    def control_pattern(self) -> re.Pattern[str] | None:
        """Matches every control token, longest first, in its one group; whitespace that a token eats is outside it."""
        added = self._full.get_added_tokens_decoder()
        parts = []
        for text, index in sorted(self.control_tokens.items(), key=lambda item: -len(item[0])):
            left, right = (r"\s*" if eats else "" for eats in (added[index].lstrip, added[index].rstrip))
            parts.append(f"{left}{re.escape(text)}{right}")
        return re.compile(f"({'|'.join(parts)})") if parts else None

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self.control_tokens.values())

    def _config_token(self, key: str) -> str | None:
        """A token's text from tokenizer_config.json, where it is a string or an object with `content`."""
        value = self.config.get(key)
        return value["content"] if isinstance(value, dict) else value


class _WordCache:
    """Encodes plain text four times faster than the library: Python's pattern, and each word encoded once.

    Training data is plain almost throughout, and making it would spend most of its time in the library's pattern.
    """

    _MAX_WORDS = 100_000
    # QWEN2_PATTERN for plain text, where \p{L} is a-z and A-Z and \p{N} is 0-9.
    _PATTERN = re.compile(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]"
        r"| ?[^\sa-zA-Z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        re.ASCII,
    )

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        known = self._ids
        for word in self._PATTERN.findall(text):
            word_ids = known.get(word)  # looked up once: another thread may clear the cache meanwhile
            if word_ids is None:
                word_ids = self._tokenizer.encode(word, add_special_tokens=False).ids
                if len(known) >= self._MAX_WORDS:
                    known.clear()
                known[word] = word_ids
            ids += word_ids
        return ids


class StreamDecoder:
    """Decodes ids as they come. The pieces together equal `decode` of all ids, and none ends inside a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        # The ids before `_num_shown` are kept because some decoders look at what stands before a token.
        self._ids: list[int] = []
        self._num_shown = 0

    def feed(self, ids: Sequence[int]) -> str:
        """The text that is complete after `ids`; "" while a character is still open."""
        self._ids.extend(ids)
        piece = self._rest()
        return "" if piece.endswith("\ufffd") else self._take(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed, else ""."""
        return self._take(self._rest())

    def _rest(self) -> str:
        shown = self._tokenizer.decode(self._ids[: self._num_shown], self._skip_special)
        return self._tokenizer.decode(self._ids, self._skip_special)[len(shown) :]

    def _take(self, piece: str) -> str:
        if piece:
            self._ids = self._ids[self._num_shown :]
            self._num_shown = len(self._ids)
        return piece


def require_match(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check that a tokenizer can belong to a model.

    Args:
        vocab_size: rows of the model's embedding.

    Raises:
        UserError: the tokenizer has ids that the model lacks, or knows far fewer ids than the model.
    """
    has = tokenizer.vocab_size
    if has > vocab_size or vocab_size - has > MAX_UNUSED_IDS:
        raise UserError(
            f"wrong tokenizer: it has {has} tokens and the model has {vocab_size}: "
            "use the tokenizer.json that came with the model"
        )


def require_same_ids(tokenizer: Tokenizer, other: Tokenizer, name: str) -> None:
    """Check that two models speak with the same tokens; ids behind the last one of either do not count.

    Args:
        name: what has the first tokenizer, in the error.

    Raises:
        UserError: an id stands for another token, or one knows far more.
    """
    theirs, ours = tokenizer.texts(), other.texts()
    shared = min(max(theirs), max(ours)) + 1
    for index in range(shared):
        if theirs.get(index) != ours.get(index):
            raise UserError(
                f"{name} speaks with other tokens: id {index} is {theirs.get(index)!r} and not {ours.get(index)!r}: "
                "take a model with the same tokenizer"
            )
    if max(len(theirs), len(ours)) - shared > MAX_UNUSED_IDS:
        raise UserError(
            f"{name} speaks with other tokens: it has {len(theirs)} and not {len(ours)}: take a model with the same "
            "tokenizer"
        )


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Qwen 2's: split by the pattern, then write bytes as printable characters."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _pre_tokenizer_values() -> Any:
    probe = tokenizers.Tokenizer(models.BPE())
    probe.pre_tokenizer = pre_tokenizer()
    return msgspec.json.decode(probe.to_str())["pre_tokenizer"]


def assemble(merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """The tokenizer of a list of merges: 256 bytes, one token a merge, then the special tokens.

    Args:
        merges: pairs of tokens in the byte-level alphabet, in order of rank.
    """
    vocabulary: dict[str, int] = {}
    for token in (*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)):
        vocabulary.setdefault(token, len(vocabulary))
    model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    # No normalizer: Qwen 2 composes characters (NFC), which would not give the same text back.
    model.pre_tokenizer = pre_tokenizer()
    model.decoder = decoders.ByteLevel()
    # The thinking marks are not "special" in the library's sense, so that decoding without special tokens shows them.
    model.add_tokens(
        [
            AddedToken(token, special=token not in (THINK_OPEN, THINK_CLOSE), normalized=False)
            for token in SPECIAL_TOKENS
        ]
    )
    # PreTrainedTokenizerFast reads tokenizer.json as it is; Qwen2Tokenizer would build its own, with a normalizer.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_prefix_space": False,
    }
    return Tokenizer(model.to_str(pretty=True), config)


def _is_plain(text: str) -> bool:
    """Whether all letters, digits and white space are ASCII; other punctuation and symbols (→, ×) may stand in it."""
    return text.isascii() or all(char < "\x80" or unicodedata.category(char)[0] in "PS" for char in set(text))


def _byte_pairs(values: dict[str, Any]) -> models.BPE | None:
    """The model of a tokenizer.json where it is BPE: handed over as it is, it is made in half the time of its JSON."""
    values = dict(values)
    if values.pop("type", None) != "BPE" or not values.keys() <= _BPE_KEYS:
        return None
    vocabulary, merges = values.pop("vocab"), values.pop("merges")
    pairs = [(left, right) for left, right in (one.split(" ") if isinstance(one, str) else one for one in merges)]
    options = {key: value for key, value in values.items() if value is not None}
    return models.BPE(vocabulary, pairs, **options)


def _library(values: dict[str, Any], model: models.BPE | None = None) -> tokenizers.Tokenizer:
    """The library's tokenizer for a decoded tokenizer.json; `model`: what its model was made into, to be shared."""
    added = values.get("added_tokens") or ()
    if model is not None:
        shell = {**values, "added_tokens": [], "model": {**values["model"], "vocab": {}, "merges": []}}
        library = tokenizers.Tokenizer.from_str(msgspec.json.encode(shell).decode())
        library.model = model
        for token in sorted(added, key=lambda token: token["id"]):
            options = {key: value for key, value in token.items() if key != "id"}
            (library.add_special_tokens if token["special"] else library.add_tokens)([AddedToken(**options)])
        # The library numbers them itself; where the file has gaps, only the whole file says which.
        if all(library.token_to_id(token["content"]) == token["id"] for token in added):
            return library
    return tokenizers.Tokenizer.from_str(msgspec.json.encode(values).decode())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is corrupt (not UTF-8): {_FIX}") from error
    except OSError as error:
        raise one_line(error, f"read the tokenizer {path}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    where = folder / "tokenizer_config.json"
    config = _read_optional(where)
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(key)
        if token is not None and not isinstance(token.get("content") if isinstance(token, dict) else token, str):
            raise UserError(f"{where}: {key} is {token!r}, expected a token's text: {_FIX}")
    return config


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, tuple[str, bool]]:
    """Id to (text, is it special) of the tokens that stand beside a SentencePiece model."""
    where = folder / "added_tokens.json"
    older = _read_optional(where)  # text to id
    newer = config.get("added_tokens_decoder") or {}
    try:
        tokens = {int(index): (str(text), True) for text, index in older.items()}
        tokens |= {int(index): (str(token["content"]), bool(token["special"])) for index, token in newer.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} or added_tokens_decoder beside it lists no tokens with their ids: {_FIX}") from error
    return tokens


def _read_optional(path: Path) -> dict[str, Any]:
    values = read_json(path, "tokenizer configuration") if path.exists() else {}
    if not isinstance(values, dict):
        raise UserError(f"the tokenizer configuration {path} is not a JSON object: {_FIX}")
    return values
