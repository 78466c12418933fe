"""The tokenizer in a GGUF file's metadata, as a tokenizer.json and back.

Two kinds are known, by `tokenizer.ggml.model`: "gpt2" (byte-level BPE by merges) and "llama" (SentencePiece's BPE by
scores).
Keys and meanings: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from openbook.core.errors import UserError, unknown_name
from openbook.tokenizer.definition import SPACE
from openbook.tokenizer.patterns import SPLIT_RULES, split_definition, split_name, split_patterns
from openbook.tokenizer.sentencepiece_model import (
    Piece,
    PieceType,
    SentencePieceModel,
    added_token,
    bos_processor,
    merges_from_scores,
)
from openbook.tokenizer.tokenizer import MAX_UNUSED_IDS, Tokenizer

_PREFIX = "tokenizer.ggml."
_FIX = "get the file from its source again"
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# Tokens that end a turn, whether or not the file says so; GGUF has room for one `eos_token_id` only.
_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>")
# Harmony's <|end|> ends a message, and another may follow; these two end the turn.
_HARMONY_ENDS = {"<|return|>", "<|call|>"}
_ARGUMENT_TYPES: dict[type, str] = {str: "a text", bool: "true or false", int: "a number"}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata, with all ids that end a turn.

    Raises:
        UserError: as `definition_from_gguf`.
    """
    pieces = _checked_pieces(metadata)
    values, config = _described(metadata, pieces)
    try:
        return Tokenizer(values, config, _stop_ids(metadata, pieces))
    except UserError as error:  # the library alone sees a merge of tokens that are not there
        raise UserError(str(error).replace("the tokenizer.json", "the GGUF file's tokenizer")) from error


def definition_from_gguf(metadata: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text of a tokenizer.json and the values of a tokenizer_config.json (chat template included).

    Args:
        metadata: a GGUF file's keys and values; arrays are lists.

    Raises:
        UserError: the metadata has no tokenizer, one of an unknown kind, or one that does not fit together.
    """
    definition, config = _described(metadata, _checked_pieces(metadata))
    return definition if isinstance(definition, str) else msgspec.json.encode(definition).decode(), config


def stop_ids_from_gguf(metadata: Mapping[str, Any]) -> list[int]:
    """Ids that end a turn: the file's own, and the control tokens that are known to."""
    return _stop_ids(metadata, _pieces(metadata))


def _checked_pieces(metadata: Mapping[str, Any]) -> list[Piece]:
    kind = _get(metadata, "model", str, "")
    if kind not in ("gpt2", "llama"):
        given = f"tokenizer.ggml.model '{kind}'" if kind else "no tokenizer (tokenizer.ggml.model)"
        raise UserError(f"the GGUF file has {given}: expected gpt2 (byte-level BPE) or llama (SentencePiece): {_FIX}")
    return _pieces(metadata)


def _described(metadata: Mapping[str, Any], pieces: list[Piece]) -> tuple[str | dict[str, Any], dict[str, Any]]:
    """The text of a tokenizer.json, or its values, and the values of a tokenizer_config.json."""
    if metadata[f"{_PREFIX}model"] == "llama":
        return _from_sentencepiece(metadata, pieces)
    return _from_byte_level(metadata, pieces)


def _stop_ids(metadata: Mapping[str, Any], pieces: Sequence[Piece]) -> list[int]:
    named = (_index(metadata, name, len(pieces)) for name in ("eos", "eot", "eom"))
    steering = {p.text: i for i, p in enumerate(pieces) if p.type in (PieceType.CONTROL, PieceType.USER_DEFINED)}
    ends = set(_TURN_ENDS) - ({"<|end|>"} if steering.keys() >= _HARMONY_ENDS else set())
    return sorted({index for index in named if index is not None} | {steering[text] for text in ends & steering.keys()})


def gguf_from_definition(
    tokenizer: Tokenizer, chat_template: str | None = None, vocab_size: int | None = None
) -> dict[str, Any]:
    """The metadata that stores a tokenizer in a GGUF file.

    GGUF has no place for a normalizer: Qwen's, which composes characters, is left out, as by llama.cpp's converter.

    Args:
        vocab_size: rows of the model's embedding; ids that the tokenizer lacks are filled up.

    Raises:
        UserError: it is neither a byte-level BPE with a split that GGUF has a name for, nor SentencePiece's BPE.
    """
    values = msgspec.json.decode(tokenizer.definition)
    model = values["model"]
    if model.get("type") != "BPE":
        raise _unwritable(f"its model is {model.get('type')}")
    pieces = _pieces_of(values, max(tokenizer.vocab_size, vocab_size or 0))
    own = (
        _write_sentencepiece(values, pieces) if model.get("byte_fallback") else _write_byte_level(values, pieces, model)
    )
    metadata: dict[str, Any] = {f"{_PREFIX}{key}": value for key, value in own.items()}
    index_of = {piece.text: index for index, piece in enumerate(pieces)}
    for key, name in _NAMED.items():
        token = tokenizer.config.get(key)
        text = token["content"] if isinstance(token, dict) else token
        if text in index_of:
            metadata[f"{_PREFIX}{name}_token_id"] = index_of[text]
    eos = metadata.get(f"{_PREFIX}eos_token_id")
    others = sorted(tokenizer.stop_ids - {eos})
    if others:
        metadata[f"{_PREFIX}{'eot' if eos is not None else 'eos'}_token_id"] = others[0]
    metadata[f"{_PREFIX}add_bos_token"] = bool(tokenizer.start_ids)
    template = chat_template or tokenizer.config.get("chat_template")
    return {**metadata, "tokenizer.chat_template": template} if isinstance(template, str) else metadata


def _from_byte_level(metadata: Mapping[str, Any], pieces: list[Piece]) -> tuple[dict[str, Any], dict[str, Any]]:
    default = "gpt-2" if metadata.get("general.architecture") == "gpt2" else ""
    name = _get(metadata, "pre", str, default)
    if name not in SPLIT_RULES:
        known = ", ".join(sorted(SPLIT_RULES))
        raise unknown_name(f"{_PREFIX}pre", name, SPLIT_RULES, f"known are {known}; convert the model from its source")
    rule = SPLIT_RULES[name]
    vocabulary = {piece.text: index for index, piece in enumerate(pieces)}
    config = _config(metadata, pieces, rule.has_bos)
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(pieces),
        "normalizer": None,
        "pre_tokenizer": split_definition(rule),
        "post_processor": _post_processor(config, vocabulary),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rule.is_kept_whole,
            "vocab": vocabulary,
            "merges": _list(metadata, "merges", str),
        },
    }
    return values, config


def _from_sentencepiece(metadata: Mapping[str, Any], pieces: list[Piece]) -> tuple[str, dict[str, Any]]:
    # Converters write the spaces of user-defined tokens as they are; SentencePiece does not.
    pieces = [
        piece._replace(text=piece.text.replace(" ", SPACE)) if piece.type == PieceType.USER_DEFINED else piece
        for piece in pieces
    ]
    config = _config(metadata, pieces, has_bos=True)
    unknown = next((index for index, piece in enumerate(pieces) if piece.type == PieceType.UNKNOWN), 0)
    bos = _index(metadata, "bos", len(pieces))
    model = SentencePieceModel(
        pieces=tuple(pieces),
        has_byte_fallback=any(piece.type == PieceType.BYTE for piece in pieces),
        unknown_id=unknown,
        bos_id=bos if bos is not None and config["add_bos_token"] else -1,
        has_space_prefix=_get(metadata, "add_space_prefix", bool, True),
        has_single_spaces=_get(metadata, "remove_extra_whitespaces", bool, False),
    )
    return model.definition(), config


def _config(metadata: Mapping[str, Any], pieces: Sequence[Piece], has_bos: bool) -> dict[str, Any]:
    ids = {key: _index(metadata, name, len(pieces)) for key, name in _NAMED.items()}
    tokens = {key: pieces[index].text for key, index in ids.items() if index is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
        "add_bos_token": _get(metadata, "add_bos_token", bool, has_bos) and "bos_token" in tokens,
        "clean_up_tokenization_spaces": False,
    }
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"tokenizer.chat_template is {template!r:.60}, expected a text: {_FIX}")
    return config if template is None else {**config, "chat_template": template}


def _pieces(metadata: Mapping[str, Any]) -> list[Piece]:
    texts = _list(metadata, "tokens", str)
    scores = _list(metadata, "scores", (int, float)) if _needs_scores(metadata) else [0.0] * len(texts)
    types = _list(metadata, "token_type", int) if f"{_PREFIX}token_type" in metadata else [1] * len(texts)
    if not texts or not len(texts) == len(scores) == len(types):
        raise UserError(
            f"the GGUF file has {len(texts)} tokens, {len(scores)} scores and {len(types)} token types, "
            f"expected as many of each: {_FIX}"
        )
    texts = [text or f"[EMPTY_{index}]" for index, text in enumerate(texts)]
    if len(set(texts)) < len(texts) or not _KINDS.issuperset(types):
        first = {text: index for index, text in reversed(list(enumerate(texts)))}
        wrong = next(index for index, text in enumerate(texts) if first[text] < index or types[index] not in _KINDS)
        raise UserError(
            f"token {wrong} of the GGUF file is {texts[wrong][:40]!r} of type {types[wrong]}, "
            f"expected a text that no other token has and a type from 0 to 6: {_FIX}"
        )
    pieces = list(map(Piece, texts, scores, (kind or 1 for kind in types)))
    # What begins or ends a text steers, however it is marked.
    for index in (_index(metadata, name, len(texts)) for name in ("bos", "eos", "eot", "eom")):
        if index is not None:
            pieces[index] = pieces[index]._replace(type=PieceType.CONTROL)
    return pieces


_KINDS = frozenset({0, *PieceType})  # 0, "undefined", stands for a normal token


def _needs_scores(metadata: Mapping[str, Any]) -> bool:
    return metadata.get(f"{_PREFIX}model") == "llama" or f"{_PREFIX}scores" in metadata


def _added(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    kinds = (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED)
    return [
        added_token(index, piece.text, is_special=piece.type != PieceType.USER_DEFINED)
        for index, piece in enumerate(pieces)
        if piece.type in kinds
    ]


def _post_processor(config: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[str, Any] | None:
    bos = config.get("bos_token")
    return bos_processor(bos, vocabulary[bos]) if bos is not None and config["add_bos_token"] else None


def _pieces_of(values: Mapping[str, Any], num_tokens: int) -> list[Piece]:
    """The tokens of a BPE tokenizer.json by their ids, without scores; ids that are not used are filled up."""
    texts = {index: text for text, index in values["model"]["vocab"].items()}
    added = {token["id"]: token for token in values.get("added_tokens") or ()}
    texts |= {index: token["content"] for index, token in added.items()}
    if num_tokens - len(texts) > MAX_UNUSED_IDS:
        raise _unwritable(f"of {num_tokens} ids it uses {len(texts)}")
    pieces = []
    for index in range(num_tokens):
        kind = PieceType.NORMAL
        if index in added:
            kind = PieceType.CONTROL if added[index]["special"] else PieceType.USER_DEFINED
        elif index not in texts:
            kind = PieceType.UNUSED
        pieces.append(Piece(texts.get(index, f"[PAD{index}]"), 0.0, kind))
    return pieces


def _write_byte_level(values: Mapping[str, Any], pieces: Sequence[Piece], model: Mapping[str, Any]) -> dict[str, Any]:
    patterns = split_patterns(values.get("pre_tokenizer"))
    name = None if patterns is None else split_name(patterns, bool(model.get("ignore_merges")))
    normalizer = values.get("normalizer")
    if name is None or (normalizer is not None and normalizer["type"] != "NFC"):
        raise _unwritable(f"no known name fits its pre_tokenizer {str(patterns)[:80]} and its normalizer")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"model": "gpt2", "pre": name, **_token_lists(pieces), "merges": merges}


def _write_sentencepiece(values: Mapping[str, Any], pieces: Sequence[Piece]) -> dict[str, Any]:
    model = values["model"]
    unknown = model.get("unk_token")
    typed = [
        piece._replace(type=PieceType.UNKNOWN)
        if piece.text == unknown
        else piece._replace(type=PieceType.BYTE)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece.text)
        else piece
        for piece in pieces
    ]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    scored = [piece._replace(score=-float(ranks.get(piece.text, len(ranks)))) for piece in typed]
    made = ["".join(merge) for merge in merges]
    is_by_score = set(merges) == set(merges_from_scores(scored)) and made == sorted(made, key=ranks.__getitem__)
    steps = values.get("normalizer") or {"normalizers": []}
    normalizers = [step["type"] for step in steps.get("normalizers", [steps])]
    before = values.get("pre_tokenizer") or {}
    has_prefix = "Prepend" in normalizers or before.get("prepend_scheme", "never") != "never"
    is_known = all(kind in ("Prepend", "Replace") for kind in normalizers)
    if not (is_by_score and is_known and before.get("type", "Metaspace") == "Metaspace"):
        raise _unwritable("its merges or its normalizer are not SentencePiece's")
    shown = [
        piece._replace(text=piece.text.replace(SPACE, " ")) if piece.type == PieceType.USER_DEFINED else piece
        for piece in scored
    ]
    lists = {**_token_lists(shown), "scores": [piece.score for piece in shown]}
    return {"model": "llama", "pre": "default", **lists, "add_space_prefix": has_prefix}


def _token_lists(pieces: Sequence[Piece]) -> dict[str, Any]:
    return {"tokens": [piece.text for piece in pieces], "token_type": [int(piece.type) for piece in pieces]}


def _unwritable(reason: str) -> UserError:
    return UserError(
        f"the tokenizer cannot be written as GGUF ({reason}): expected a byte-level BPE with a published pattern, "
        "or SentencePiece's BPE; keep the Hugging Face folder"
    )


def _index(metadata: Mapping[str, Any], name: str, num_tokens: int) -> int | None:
    """A special token's id; None where the file has none, or one that no token has, as some converters write."""
    index = metadata.get(f"{_PREFIX}{name}_token_id")
    if index is not None and (not isinstance(index, int) or isinstance(index, bool)):
        raise UserError(f"{_PREFIX}{name}_token_id is {index!r:.60}, expected a number: {_FIX}")
    return index if index is not None and 0 <= index < num_tokens else None


def _get(metadata: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = metadata.get(f"{_PREFIX}{name}", default)
    if not isinstance(value, kind):
        raise UserError(f"{_PREFIX}{name} is {value!r:.60}, expected {_ARGUMENT_TYPES[kind]}: {_FIX}")
    return value


def _list(metadata: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> list[Any]:
    values = metadata.get(f"{_PREFIX}{name}")
    if not isinstance(values, list) or not all(issubclass(one, kind) for one in set(map(type, values))):
        what = "text" if kind is str else "numbers"
        raise UserError(f"the GGUF file has no list of {what} as {_PREFIX}{name}: {_FIX}")
    return values
