"""What the engine says while it answers; plain values, which travel between processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from openbook.engine.request import FinishReason
from openbook.engine.transcript import Piece
from openbook.tokenizer.tools import ToolCall


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """How likely a token was before temperature and filters, in nats, and the likeliest ones in its place."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)  # (token id, logprob), likeliest first


@dataclass(frozen=True, kw_only=True)
class SequenceEvent:
    """What one step added to one sequence of a request.

    Args:
        request_id: of the request.
        index: of the sequence, from 0 to the request's `num_samples` - 1.
        token_ids: the new tokens: none, one, or with speculation several.
        pieces: the text that they complete.
        tool_calls: the calls that they complete.
        logprobs: one for each new token if the request asked for them.
        prompt_logprobs: one for each token of the prompt but the first, with a sequence's first event, if asked for.
        cached_tokens: tokens of the prompt that another request had computed; the same in all events of a sequence.
        finish_reason: set with the sequence's last event.
        error: what went wrong, in one line, if the finish reason is "error".
    """

    request_id: str
    index: int
    token_ids: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """How busy an engine is."""

    num_running: int
    num_waiting: int
    num_blocks: int  # of the whole cache
    num_free_blocks: int  # those that hold only a reusable prefix included
    num_steps: int  # since the start, as all that follows
    num_prompt_tokens: int  # computed
    num_cached_tokens: int  # of prompts, found in the cache
    num_new_tokens: int
    num_preempted: int
    num_draft_tokens: int
    num_accepted_tokens: int
    step_s: float  # seconds spent in steps
    model_s: float  # of these, in the runner
