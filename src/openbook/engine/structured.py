"""Answers that obey: which tokens a JSON schema, a regular expression, a list of choices or a grammar allows next.

`llguidance` (https://github.com/guidance-ai/llguidance) does the parsing; here it gets our vocabularies, and is asked.
It is imported with the first constraint only.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from openbook.core.errors import UserError
from openbook.engine.request import Constraint
from openbook.tokenizer.marks import ChatFormat
from openbook.tokenizer.token_bytes import drops_first_space, token_bytes
from openbook.tokenizer.tokenizer import Tokenizer
from openbook.tokenizer.tools import json_value

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Between the parts of a JSON text at most one line break and an indent: an unsure model would fill pages with them.
JSON_OPTIONS = {"whitespace_pattern": r"[ \t]{1,64}|\r?\n[ \t]{0,64}"}
_MAX_COMPILED = 64
_MAX_LEXER_STATES = 50_000  # 1 to 2 kB each
_NAMES = {
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "choice": "list of choices",
    "lark": "Lark grammar",
}
# What eight bits of a mask add to eight logits: 0 where a bit is set, else minus infinity.
_BIASES = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.float32(0), -np.inf
).astype(np.float32)


class GrammarCompiler:
    """Makes grammars for one model.

    Args:
        tokenizer: the model's.
        vocab_size: number of its logits, V; ids that the tokenizer lacks are never allowed.
        chat_format: how it speaks, which says what ends an answer beside the tokenizer's stop ids, and whether line
            breaks may stand between the thinking and the answer, as many families write them.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, chat_format: ChatFormat | None = None) -> None:
        chat_format = chat_format or ChatFormat()
        control = tokenizer.control_tokens
        self.vocab_size = vocab_size
        self.stop_ids = tokenizer.stop_ids | {control[token] for token in chat_format.stops if token in control}
        self._tokenizer = tokenizer
        self._has_thinking = chat_format.thinking is not None
        self._lock = threading.Lock()
        self._compiled: dict[tuple[Constraint, bool], LLMatcher] = {}
        self._completing: dict[tuple[str, str, bool], NDArray[np.int64]] = {}

    def compile(self, constraint: Constraint, is_text: bool = False) -> GrammarState:
        """A new state, at the beginning of an answer; the first one of a constraint takes a while.

        Any thread may ask. White space that a `Transcript` does not show is allowed before the answer where families
        put it: line breaks behind the thinking, and the space that SentencePiece puts before a first word.

        Args:
            is_text: the answer continues a text, and is shown from the first character on.

        Raises:
            UserError: the constraint is wrong or too large, or a part of it cannot be enforced.
        """
        key = constraint, is_text
        matcher = self._compiled.get(key)
        if matcher is None:
            matcher = self._compile(constraint, "" if is_text else self._lead)
            with self._lock:
                while len(self._compiled) >= _MAX_COMPILED:
                    self._compiled.pop(next(iter(self._compiled)))
                self._compiled[key] = matcher

        def forget() -> None:  # copies share what their lexer has found out, and its limits
            with self._lock:
                self._compiled.pop(key, None)

        return GrammarState(matcher.deep_copy(), self, forget)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """What each of the V ids stands for; b"" for control tokens and unused ids."""
        known = token_bytes(self._tokenizer)
        return known + [b""] * (self.vocab_size - len(known))

    def ids_completing(self, begun: str, mark: str, is_going_on: bool) -> NDArray[np.int64]:
        """The tokens that complete a mark of which `begun` has been said; `is_going_on`: and say more than line breaks.

        int64 [N].
        """
        key = (begun, mark, is_going_on)
        if key not in self._completing:
            held, wanted = begun.encode(), mark.encode()
            ids = []
            for index, new in enumerate(self.token_bytes):
                _, found, behind = (held + new).partition(wanted)
                if found and (not is_going_on or behind.strip(b"\n")):
                    ids.append(index)
            self._completing[key] = np.array(ids, dtype=np.int64)
        return self._completing[key]

    def _compile(self, constraint: Constraint, lead: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        try:
            grammars = [_grammar(constraint)]
        except (ValueError, RecursionError) as error:
            raise _refused(constraint, str(error) or type(error).__name__) from error
        if lead:
            grammars = [{"lark_grammar": f"start: LEAD? @answer\nLEAD: /{lead}/"}, {"name": "answer", **grammars[0]}]
        source = json.dumps({"grammars": grammars})
        matcher = LLMatcher(self._library_tokenizer, source, log_level=0, limits=limits)
        if not matcher.is_error():
            probe = matcher.deep_copy()
            probe.compute_bitmask()
            if not probe.is_error():
                return matcher
            matcher = probe
        raise _refused(constraint, matcher.get_error())

    @cached_property
    def _lead(self) -> str:
        """A regular expression for the white space that may stand before an answer."""
        leads = [r"\n{1,2}"] if self._has_thinking else []
        return "|".join([*leads, " "] if drops_first_space(self._tokenizer) else leads)

    @cached_property
    def _library_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        vocabulary = _Vocabulary(self._tokenizer, self.token_bytes, self.stop_ids)
        return LLTokenizer(vocabulary, eos_token=sorted(self.stop_ids) or [self.vocab_size])  # type: ignore[arg-type]


class GrammarState:
    """Where one answer stands in its grammar; made by `GrammarCompiler.compile`."""

    def __init__(self, matcher: LLMatcher, compiler: GrammarCompiler, on_error: Callable[[], None]) -> None:
        self._matcher, self._on_error = matcher, on_error
        self.compiler = compiler

    def mask(self) -> NDArray[np.uint32]:
        """Which tokens may come next: bit i % 32 of word i // 32 is set for token i; uint32 [ceil(V / 32)].

        Stop ids are allowed where the answer may end, and they alone where it must.

        Raises:
            UserError: no token can follow, or the grammar has become too complex to go on.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype="<u4")
        self._check()
        return words[: -(-self.compiler.vocab_size // 32)]

    def masked(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """A copy of logits float32 [V] with minus infinity where a token may not come next; errors as `mask`."""
        eights = self.mask().view(np.uint8)[: -(-len(logits) // 8)]
        masked: NDArray[np.float32] = np.take(_BIASES, eights, axis=0, mode="clip").reshape(-1)[: len(logits)]
        masked += logits
        return masked

    def allows(self, token_id: int) -> bool:
        """Whether a token may come next; errors as `mask`."""
        return bool(self.mask()[token_id // 32] >> np.uint32(token_id % 32) & 1)

    def accept(self, token_id: int) -> bool:
        """Go on with a token; False, and nothing changed, if the grammar does not allow it.

        Raises:
            UserError: the grammar has become too complex to go on.
        """
        is_end = self.is_finished and token_id in self.compiler.stop_ids
        is_accepted = is_end or self._matcher.try_consume_tokens([token_id]) == 1
        self._check()
        return is_accepted

    def validate(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens `accept` would take one after another; the state stays as it is."""
        return self._matcher.validate_tokens(list(token_ids))

    def reset(self) -> None:
        """Return to the beginning of the answer."""
        self._matcher.reset()

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete and nothing can follow: only a stop token, which need not be waited for."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            self._on_error()
            raise UserError(
                f"the answer cannot go on within its constraint ({_one_line(self._matcher.get_error())}): simplify it"
            )


class _Vocabulary:
    """Our tokenizer in the shape that the library asks for."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], stop_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        # A control token, marked by a byte that no text has, stands for no text in a grammar.
        self.tokens = [b"" if token.startswith(b"\xff") else token for token in tokens]
        control = {index: text for text, index in tokenizer.control_tokens.items()}
        for index in control.keys() | stop_ids:
            self.tokens[index] = b"\xff" + control.get(index, f"<[{index}]>").encode()
        self.special_token_ids = sorted(control.keys() | stop_ids)
        # The library wants an end: where the model has none, it is an id behind all logits.
        self.eos_token_id = min(stop_ids, default=len(tokens))
        if not stop_ids:
            self.tokens.append(b"\xff<end>")

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, follows="text")


def _grammar(constraint: Constraint) -> dict[str, Any]:
    """In the library's notation.

    Raises:
        ValueError: the source is not what its kind says.
        RecursionError: it is nested too deeply.
    """
    if constraint.kind == "lark":
        return {"lark_grammar": constraint.source}
    if constraint.kind == "regex":
        from llguidance import regex_to_lark

        return {"lark_grammar": f"start: /{regex_to_lark(constraint.source, 'd')}/"}
    value = json_value(constraint.source)
    if constraint.kind == "json_schema":
        if not isinstance(value, dict) and value is not True:
            raise ValueError("it is no JSON object")
        schema: dict[str, Any] = {} if value is True else value
        options = schema.get("x-guidance", {})  # the library's own way to be told more
        if not isinstance(options, dict):
            raise ValueError("its x-guidance is no JSON object")
        return {"json_schema": {**schema, "x-guidance": JSON_OPTIONS | options}}
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise ValueError("it is no JSON list of at least one string")
    return {"lark_grammar": "start: ONE\nONE: " + " | ".join(lark_text(one) for one in value)}


def lark_text(text: str) -> str:
    """A text as a literal in a Lark grammar."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f")


def _refused(constraint: Constraint, reason: str) -> UserError:
    return UserError(
        f"the {_NAMES[constraint.kind]} is refused ({_one_line(reason)}): expected one that can be enforced; correct it"
    )


def _one_line(text: str) -> str:
    text = " ".join(text.replace("<non-verbose/>", "").split())
    return text if len(text) <= 200 else f"{text[:200]}..."
