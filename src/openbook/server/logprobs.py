"""Log probabilities in the shapes of the OpenAI API."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from openbook.core.errors import UserError
from openbook.engine.events import SequenceEvent, TokenLogprob
from openbook.tokenizer.token_bytes import token_bytes
from openbook.tokenizer.tokenizer import Tokenizer


class TokenTexts:
    """What single tokens are called in answers.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names = {index: token for token, index in tokenizer.control_tokens.items()}
        try:
            self._bytes = token_bytes(tokenizer)
        except UserError:  # a vocabulary whose tokens have no bytes of their own
            self._bytes = []

    def is_control(self, token_id: int) -> bool:
        """Whether a token is no text but a mark."""
        return token_id in self._names

    def data(self, token_id: int) -> bytes | None:
        """The bytes that a token stands for; None where there are none to name."""
        if token_id in self._names:
            return self._names[token_id].encode()
        return self._bytes[token_id] if token_id < len(self._bytes) else None

    def text(self, token_id: int) -> str:
        """A token's text; bytes that are no character by themselves become U+FFFD."""
        data = self.data(token_id)
        if data is not None:
            return data.decode(errors="replace")
        return self._tokenizer.decode([token_id]) if token_id < self._tokenizer.vocab_size else ""


def chat_logprob(texts: TokenTexts, logprob: TokenLogprob) -> dict[str, Any]:
    """An entry of `logprobs.content`."""
    entry = _entry(texts, logprob.token_id, logprob.logprob)
    return {**entry, "top_logprobs": [_entry(texts, token_id, value) for token_id, value in logprob.top]}


def _entry(texts: TokenTexts, token_id: int, logprob: float) -> dict[str, Any]:
    data = texts.data(token_id)
    return {
        "token": texts.text(token_id),
        "logprob": finite(logprob),
        "bytes": None if data is None else list(data),
    }


def finite(logprob: float) -> float:
    """JSON has no infinity: what cannot be is -9999, as in the OpenAI API."""
    return max(logprob, -9999.0)


class ChatLogprobs:
    """Sorts the tokens of a generation's choices into those of the answer and those of the thinking; marks are in
    neither. A token that completes no text yet goes where the next text goes."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._held: dict[int, list[TokenLogprob]] = {}
        self._all: dict[int, dict[str, Any]] = {}

    def feed(self, choice: int, event: SequenceEvent) -> dict[str, Any] | None:
        """The entries that are certain after an event of a choice, as in `logprobs`; None if none are."""
        held = self._held.setdefault(choice, [])
        for logprob in event.logprobs:
            if self._texts.is_control(logprob.token_id):
                held.clear()  # the words of a header
            else:
                held.append(logprob)
        if not held or not (event.pieces or event.tool_calls or event.finish_reason):
            return None
        is_thinking = bool(event.pieces) and event.pieces[-1].kind == "reasoning" and not event.tool_calls
        entries = [chat_logprob(self._texts, logprob) for logprob in held]
        held.clear()
        new = _chat_logprobs([] if is_thinking else entries, entries if is_thinking else [])
        so_far = self.all(choice)
        for name in ("content", "reasoning"):
            so_far[name] += new[name]
        return new

    def all(self, choice: int) -> dict[str, Any]:
        """All entries of a choice."""
        return self._all.setdefault(choice, _chat_logprobs([], []))


def _chat_logprobs(content: list[Any], reasoning: list[Any]) -> dict[str, Any]:
    return {"content": content, "refusal": None, "reasoning": reasoning}


def prompt_logprobs(
    texts: TokenTexts, found: Iterable[TokenLogprob] | None
) -> list[dict[str, dict[str, Any]] | None] | None:
    """`prompt_logprobs` as vLLM has them: null for the first token, then for each the candidates by id."""
    if found is None:
        return None
    rows: list[dict[str, dict[str, Any]] | None] = [None]
    for logprob in found:
        ranks = {token_id: rank for rank, (token_id, _) in enumerate(logprob.top, 1)}
        values = {**dict(logprob.top), logprob.token_id: logprob.logprob}
        rows.append(
            {
                str(token_id): {
                    "logprob": finite(value),
                    "rank": ranks.get(token_id),
                    "decoded_token": texts.text(token_id),
                }
                for token_id, value in values.items()
            }
        )
    return rows


def completion_logprobs(
    texts: TokenTexts, token_ids: Sequence[int], found: Sequence[TokenLogprob | None], offset: int
) -> dict[str, Any]:
    """`logprobs` of a text completion.

    Args:
        found: one for each token; None for a prompt's first.
        offset: characters of the text before the first of these tokens.
    """
    names = [texts.text(token_id) for token_id in token_ids]
    offsets = []
    for token_id, name in zip(token_ids, names, strict=True):
        offsets.append(offset)
        offset += 0 if texts.is_control(token_id) else len(name)
    return {
        "tokens": names,
        "token_logprobs": [None if one is None else finite(one.logprob) for one in found],
        "top_logprobs": [
            None if one is None else {texts.text(token_id): finite(value) for token_id, value in one.top}
            for one in found
        ],
        "text_offset": offsets,
    }
