"""What a client asks of the engine: sampling parameters and one request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from openbook.core.errors import UserError
from openbook.tokenizer.images import ImagePatches

# As in the OpenAI API: the model or a stop string ended it, or a limit did. And: it is no longer wanted, or it
# failed.
FinishReason = Literal["stop", "length", "cancelled", "error"]

ConstraintKind = Literal["json_schema", "regex", "choice", "lark"]

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """What an answer must obey; the thinking before it is free.

    Args:
        kind: how `source` is to be read.
        source: a JSON schema as JSON text, a regular expression, a JSON list of strings of which the answer is one, or
            a grammar in Lark's notation.
    """

    kind: ConstraintKind
    source: str


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen; the defaults are greedy decoding.

    Args:
        temperature: logits are divided by it; 0 takes the most likely token, and the next three then change nothing.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach this sum, in (0, 1].
        min_p: keep tokens at least this share as likely as the likeliest one, in [0, 1].
        repetition_penalty: positive logits of tokens in prompt or answer are divided by it, negative ones multiplied
            (arXiv 1909.05858); above 0, 1 changes nothing.
        presence_penalty: taken off the logits of tokens that the answer has, from -2 to 2.
        frequency_penalty: taken off once for each time that the answer has a token, from -2 to 2.
        logit_bias: pairs of a token id and what is added to its logit, from -100 to 100.
        stop: strings that end the answer (not the thinking before it); they are not part of it.
        stop_ids: tokens that end it too, beside the model's own.
        ignore_eos: go on behind the model's own stop tokens.
        max_tokens: most tokens to generate, thinking included; None is up to the context limit.
        seed: chooses the random numbers, 0 to 2^64 - 1.
        num_logprobs: how many of the likeliest tokens to report beside each chosen one, 0 to 20; None reports nothing.
        num_prompt_logprobs: likewise for the tokens of the prompt but the first.
        thinking_budget: most tokens of thinking; then it is closed and the answer begins. None: no limit.
        constraint: what the answer must obey.

    Raises:
        UserError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = None
    seed: int = 0
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    thinking_budget: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 or more"
        )
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        penalty = self.repetition_penalty
        _require(math.isfinite(penalty) and penalty > 0, "repetition_penalty", penalty, "more than 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "from -2 to 2")
        for token_id, bias in self.logit_bias:
            _require(token_id >= 0 and -100 <= bias <= 100, "logit_bias", {token_id: bias}, "ids and -100 to 100")
        for name in ("num_logprobs", "num_prompt_logprobs"):
            number = getattr(self, name)
            _require(number is None or 0 <= number <= MAX_LOGPROBS, name, number, f"from 0 to {MAX_LOGPROBS}")
        budget = self.thinking_budget
        _require(budget is None or budget >= 0, "thinking_budget", budget, "0 or more")
        _require(all(self.stop), "stop", list(self.stop), "strings that are not empty")
        _require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        _require(0 <= self.seed <= MAX_SEED, "seed", self.seed, "from 0 to 2^64 - 1")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


def _require(holds: bool, name: str, given: object, expected: str) -> None:
    if not holds:
        raise UserError(f"{name} is {given}: expected {expected}; correct that value")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how to continue it, in one sequence or several.

    Args:
        images: those in the prompt, in order; each has its image tokens in `prompt_ids`.
        id: what the engine calls it; unlike that of any other request that is running.
        num_samples: how many sequences continue the prompt, each with random numbers of its own.
        priority: lower is served first; equal ones in the order in which they came.
        adapter: the name of a loaded adapter; None is the model as it is.
        tool_names: the tools on offer, which decide what counts as a call.
        is_text: the prompt is a text to continue, not a conversation: no thinking or calls are looked for.

    Raises:
        UserError: no sample is asked for.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    images: Sequence[ImagePatches] = ()
    id: str = ""
    num_samples: int = 1
    priority: int = 0
    adapter: str | None = None
    tool_names: tuple[str, ...] = ()
    is_text: bool = False

    def __post_init__(self) -> None:
        _require(self.num_samples >= 1, "n", self.num_samples, "1 or more")

    def num_new_tokens(self, max_model_len: int) -> int:
        """Most tokens that may follow the prompt.

        Raises:
            UserError: the prompt is empty, or leaves no room in a context of `max_model_len` tokens.
        """
        num_prompt = len(self.prompt_ids)
        if num_prompt == 0:
            raise UserError("the prompt is empty: expected at least one token; give some text")
        if num_prompt >= max_model_len:
            raise UserError(
                f"the prompt has {num_prompt:,} tokens and the model's context is {max_model_len:,} "
                "(prompt and answer): shorten the prompt"
            )
        room = max_model_len - num_prompt
        return room if self.params.max_tokens is None else min(room, self.params.max_tokens)
