"""The bytes that each token of a vocabulary stands for, which a grammar needs to know which tokens it allows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from openbook.core.errors import UserError
from openbook.tokenizer.definition import SPACE
from openbook.tokenizer.tokenizer import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# GPT-2's way to write bytes as printable characters (its encoder.py): those that print stand for themselves, the others
# follow from U+0100 on. What is no character of this alphabet becomes one that Latin-1 lacks.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF_CHAR = {
    **dict.fromkeys(_OTHERS, "\uffff"),
    **{byte: chr(byte) for byte in _PRINTABLE},
    **{0x100 + index: chr(byte) for index, byte in enumerate(_OTHERS)},
}


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """What each id adds to a text, in UTF-8; b"" for control tokens and for ids that no token has.

    Raises:
        UserError: the vocabulary is neither byte-level nor SentencePiece's, so that a token's bytes depend on others.
    """
    values = msgspec.json.decode(tokenizer.definition)
    steps = _decoder_steps(values)
    kinds = {step["type"] for step in steps}
    vocabulary = values["model"]["vocab"]
    texts: Mapping[str, int] = (
        vocabulary if isinstance(vocabulary, dict) else {text: index for index, (text, _) in enumerate(vocabulary)}
    )
    control = set(tokenizer.control_tokens.values())
    added = {token["content"]: token["id"] for token in values.get("added_tokens") or () if token["id"] not in control}
    found = [b""] * tokenizer.vocab_size
    if "ByteLevel" in kinds:
        for text, index in texts.items():
            found[index] = _byte_level(text)
        for index in added.values():
            text = tokenizer.decode([index])
            found[index] = b"" if "\ufffd" in text else text.encode()
    elif kinds & {"Metaspace", "ByteFallback"}:
        for text, index in (*texts.items(), *added.items()):
            piece = _BYTE_PIECE.fullmatch(text) if "ByteFallback" in kinds else None
            found[index] = bytes([int(piece[1], 16)]) if piece else text.replace(SPACE, " ").encode()
    else:
        raise UserError(
            f"the tokenizer decodes with {', '.join(sorted(kinds)) or 'nothing'}: expected a byte-level or a "
            "SentencePiece vocabulary; ask this model without a constraint"
        )
    for index in control:
        found[index] = b""
    return found


def drops_first_space(tokenizer: Tokenizer) -> bool:
    """Whether decoding leaves out a space before the first word, as that of most SentencePiece families does."""
    for step in _decoder_steps(msgspec.json.decode(tokenizer.definition)):
        if step["type"] == "Strip" and step["start"]:
            return True
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return True
    return False


def _byte_level(text: str) -> bytes:
    try:
        return text.translate(_BYTE_OF_CHAR).encode("latin-1")
    except UnicodeEncodeError:  # not in the alphabet: the library, too, takes it as text
        return text.encode()


def _decoder_steps(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    decoder = values.get("decoder") or {"type": "Sequence", "decoders": []}
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps
