"""What a tokenizer.json says, and the same for text alone: no control tokens, one leading space where it belongs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple

SPACE = "▁"  # how SentencePiece writes a space
_MARK = re.compile(r"[<\[{].*[>\]}]", re.DOTALL)
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def is_control(content: str, special: bool) -> bool:
    """Whether an added token steers the model: it is special, or written as a mark is (<think>, [INST]).

    Runs of spaces and words, which some families add, are text.
    """
    return special or _MARK.fullmatch(content) is not None


# What stands before a text in a conversation.
Follows = Literal["nothing", "control", "text"]
FOLLOWS: tuple[Follows, ...] = ("nothing", "control", "text")


class LeadingSpace(NamedTuple):
    """The space that SentencePiece puts before a text.

    Attributes:
        is_after_control: also before text that follows a control token, else only where a conversation begins.
        is_always: also before text that begins with a space.
    """

    is_after_control: bool
    is_always: bool

    def put(self, text: str, follows: Follows) -> str:
        """The text, with a space in front where the rule wants one."""
        if not text or follows == "text" or (follows == "control" and not self.is_after_control):
            return text
        return text if not self.is_always and text[0] in (" ", SPACE) else " " + text


def leading_space(values: Mapping[str, Any], config: Mapping[str, Any]) -> LeadingSpace | None:
    """The rule of a tokenizer.json, where it is one that only spaces decide; else None, and the library applies it.

    A `Prepend` is SentencePiece's own rule. Transformers' `legacy: false` (tokenizer_config.json) keeps it from text
    after control tokens; the older behaviour, with which most such models were published, is the default.
    A `Metaspace` that prepends "first" does the same, but not before a space.
    """
    steps = _steps(values.get("normalizer"), "normalizers")
    others = [step for step in steps if step["type"] != "Prepend"]
    has_only_spaces = all(step["type"] == "Replace" and step["pattern"] == {"String": " "} for step in others)
    if len(others) < len(steps) and has_only_spaces:
        return LeadingSpace(is_after_control=config.get("legacy") is not False, is_always=True)
    before = _steps(values.get("pre_tokenizer"), "pretokenizers")
    if not steps and [step.get("prepend_scheme") for step in before] == ["first"]:
        return LeadingSpace(is_after_control=False, is_always=False)
    return None


def check_definition(values: Mapping[str, Any]) -> None:
    """What the library finds out only later: with a panic while it builds, or an error when a text is encoded.

    Raises:
        ValueError: the tokenizer.json is damaged.
    """
    model = values["model"]
    prefix = model.get("continuing_subword_prefix") or ""
    if not all(_pair(merge)[-1].startswith(prefix) for merge in (model.get("merges") or ()) if prefix):
        raise ValueError("a merge is shorter than continuing_subword_prefix")
    vocabulary, unknown = model.get("vocab"), model.get("unk_token")
    if isinstance(vocabulary, list):
        unknown = model.get("unk_id")
        if not isinstance(unknown, int) or not 0 <= unknown < len(vocabulary):
            raise ValueError(f"unk_id is {unknown}")
    elif unknown is not None and unknown not in vocabulary:
        raise ValueError(f"unk_token is {unknown}, which is not in the vocabulary")
    # No family does this, and the library panics on every piece of text that is shorter.
    if any(step["type"] == "Strip" and step["stop"] for step in _steps(values.get("decoder"), "decoders")):
        raise ValueError("its decoder strips the end")


def start_ids(values: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that the `post_processor` of a tokenizer.json puts before a text."""
    for step in _steps(values.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing":
            leading = takewhile(lambda part: "SpecialToken" in part, step["single"])
            tokens = [step["special_tokens"][part["SpecialToken"]["id"]] for part in leading]
            return tuple(index for token in tokens for index in token["ids"])
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            return (step["cls"][1],)
    return ()


def without_control_tokens(values: dict[str, Any], has_leading_space: bool) -> dict[str, Any]:
    """The same tokenizer for text only: no control tokens, nothing put around the text, no cutting or filling.

    Args:
        values: a decoded tokenizer.json; it stays as it is.
        has_leading_space: leave out the leading space, because the caller puts it.
    """
    added = values.get("added_tokens") or ()
    control = {token["content"] for token in added if is_control(token["content"], token["special"])}
    values = dict(values)
    values["added_tokens"] = [token for token in added if token["content"] not in control]
    values.update(post_processor=None, truncation=None, padding=None)
    model = values["model"]
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if isinstance(vocabulary, list):
        # The library's Unigram finds every entry in a text, so these are named as no text can be: with a real space.
        hidden = [[f" {text}" if text in control else text, score] for text, score in vocabulary]
        values["model"] = {**model, "vocab": hidden}
    elif vocabulary is not None:
        # The library numbers added tokens by their count, unless the vocabulary has them.
        plain = {token["content"]: token["id"] for token in values["added_tokens"]}
        if control and not plain.keys() <= vocabulary.keys():
            values["model"] = {**model, "vocab": {**plain, **vocabulary}}
        if merges and any(text in vocabulary for text in control):  # a merge makes what is in the vocabulary
            kept = [merge for merge in merges if _made_by(merge) not in control]
            if len(kept) < len(merges):
                values["model"] = {**values["model"], "merges": kept}
    if has_leading_space:
        values["normalizer"] = _without(values.get("normalizer"), "normalizers", lambda step: step["type"] == "Prepend")
        values["pre_tokenizer"] = _never_prepend(values.get("pre_tokenizer"))
    return values


class ByteDecoder:
    """Decodes ids of a vocabulary with byte pieces (`<0xE2>`), byte by byte.

    The library gives up a whole run of byte pieces where one of them is wrong; so what a stream has shown could be
    taken back by the pieces that follow.
    """

    def __init__(self, vocabulary: Mapping[str, int], has_leading_space: bool) -> None:
        self._has_leading_space = has_leading_space
        self._bytes = {index: _bytes_of(token) for token, index in vocabulary.items()}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; an id that no token has gives nothing, bytes that are no UTF-8 give U+FFFD."""
        text = b"".join(self._bytes.get(index, b"") for index in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._has_leading_space else text


def byte_decoder(values: Mapping[str, Any], vocabulary: Callable[[], Mapping[str, int]]) -> ByteDecoder | None:
    """For a tokenizer.json whose decoder is SentencePiece's with byte fallback; else None."""
    steps = _steps(values.get("decoder"), "decoders")
    kinds = [step["type"] for step in steps]
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
        return None
    replace, strip = steps[0], steps[3:]
    is_known = (replace["pattern"], replace["content"]) == ({"String": SPACE}, " ")
    is_known &= all((step["content"], step["start"], step["stop"]) == (" ", 1, 0) for step in strip)
    return ByteDecoder(vocabulary(), bool(strip)) if is_known else None


def _bytes_of(token: str) -> bytes:
    found = _BYTE.fullmatch(token)
    return bytes([int(found[1], 16)]) if found else token.replace(SPACE, " ").encode()


def _pair(merge: str | Sequence[str]) -> Sequence[str]:
    """Two tokens; older files write them as one text with a space between."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _made_by(merge: str | Sequence[str]) -> str:
    return merge.replace(" ", "") if isinstance(merge, str) else "".join(merge)


def _steps(value: Any, key: str) -> list[dict[str, Any]]:
    """The components of a `Sequence`, one component, or none."""
    if value is None:
        return []
    steps: list[dict[str, Any]] = value[key] if value["type"] == "Sequence" else [value]
    return steps


def _without(value: Any, key: str, is_unwanted: Callable[[dict[str, Any]], bool]) -> Any:
    kept = [step for step in _steps(value, key) if not is_unwanted(step)]
    return {"type": "Sequence", key: kept} if kept else None


def _never_prepend(value: Any) -> Any:
    if value is None or value["type"] != "Metaspace":
        return value
    return {**value, "prepend_scheme": "never"}
