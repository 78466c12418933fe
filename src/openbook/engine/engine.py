"""The continuous-batching engine: many requests, one step at a time.

Each step takes some tokens of every sequence that is being read or written, so that a request joins as it comes and
leaves as it ends. What is in a step with a sequence changes none of its tokens, and in the exact profile no bit of its
logits. Everything here runs in one thread; `local_engine.py` puts it behind an event loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from openbook.core.errors import UserError
from openbook.engine.block_manager import BlockManager
from openbook.engine.drafting import StepCost
from openbook.engine.embedding import Embedder, EmbeddingJob, require_embeddable
from openbook.engine.events import EngineStats, SequenceEvent, TokenLogprob
from openbook.engine.next_token import NextToken
from openbook.engine.paged import BLOCK_TOKENS, PagedRunner, PagedStep
from openbook.engine.request import Request
from openbook.engine.sampler import token_logprob
from openbook.engine.scheduler import Chunk, Plan, Scheduler
from openbook.engine.sequence import Sequence

if TYPE_CHECKING:
    from openbook.engine.sequence_factory import SequenceFactory

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How an engine uses its machine.

    Args:
        max_running: most sequences that are worked on at a time.
        max_waiting: most requests that wait; more are turned away.
        max_step_tokens: most tokens of one step; with fewer new tokens come more evenly, with more prompts are read
            faster.
        cache_bytes: memory for keys and values.
        max_model_len: most tokens of one sequence; None is the model's own limit. The cache may lower it.
        has_prefix_cache: whether a prompt reuses what others with the same beginning have computed.
        num_draft_tokens: most tokens to guess ahead of each sequence; fewer where guesses go wrong, 0 guesses none.
        draft_model: the model that guesses, by name, path or hub id; None guesses from what a sequence has said before.

    Raises:
        UserError: a number is too small, or a draft model is to guess no tokens.
    """

    max_running: int = 64
    max_waiting: int = 1024
    max_step_tokens: int = 512
    cache_bytes: int = 1 << 30
    max_model_len: int | None = None
    has_prefix_cache: bool = True
    num_draft_tokens: int = 0
    draft_model: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_running", 1), ("max_waiting", 1), ("max_step_tokens", 1), ("num_draft_tokens", 0)):
            value = getattr(self, name)
            if value < least:
                raise UserError(f"{name} is {value}: expected {least} or more; correct that value")
        if self.draft_model is not None and self.num_draft_tokens == 0:
            raise UserError(
                f"the draft model {self.draft_model} is given and num_draft_tokens is 0: expected 1 or more; "
                "4 is a good start"
            )


class Drafter(Protocol):
    """Guesses what sequences will say next."""

    def propose(self, sequences: Tokens[Sequence], cost: StepCost) -> None:
        """Set the `draft_ids` of sequences of which one token is to be computed, as many as are worth their `cost`."""

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""


class Engine:
    """Runs requests to their end on one runner.

    Args:
        runner: computes the logits.
        factory: makes a request's sequences.
        settings: how much of what.
        drafter: guesses tokens ahead; None where nothing is guessed.

    Raises:
        UserError: the cache is too small for a single block a sequence.
    """

    def __init__(
        self, runner: PagedRunner, factory: SequenceFactory, settings: EngineSettings, drafter: Drafter | None = None
    ) -> None:
        self._runner, self._factory, self._drafter = runner, factory, drafter
        longest = min(runner.max_model_len, settings.max_model_len or runner.max_model_len)
        most_blocks = settings.max_running * -(-longest // BLOCK_TOKENS)
        num_blocks = min(settings.cache_bytes // runner.block_bytes, most_blocks)
        if num_blocks < 1:
            raise UserError(
                f"the cache has {settings.cache_bytes:,} bytes and one block of {BLOCK_TOKENS} tokens takes "
                f"{runner.block_bytes:,}: give it more memory"
            )
        self.settings = settings
        self.max_model_len = min(longest, num_blocks * BLOCK_TOKENS)
        self._cache = runner.paged_cache(num_blocks)
        self._blocks = BlockManager(num_blocks, settings.has_prefix_cache)
        self._scheduler = Scheduler(self._blocks, settings.max_running, settings.max_step_tokens)
        self._embedder = Embedder(runner, settings.max_step_tokens)
        self._arrivals = 0
        self._cost = StepCost()
        self._num_steps = self._num_prompt = self._num_new = self._num_drafts = self._num_accepted = 0
        self._step_s = self._model_s = 0.0

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._scheduler.running or self._scheduler.waiting) or self._embedder.has_work

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks yet."""
        return len(self._scheduler.waiting)

    def prepare(self, request: Request, index: int = 0, most_tokens: int | None = None) -> Sequence:
        """The first sequence of a request, checked; may be called from any thread, and takes a while for a grammar.

        Args:
            index: the sample of which the first shall be; its random numbers are those of that sample.
            most_tokens: a limit beside those of the request and the context.

        Raises:
            UserError: the prompt is empty or past the context, or its constraint or a token id is wrong.
        """
        limit = request.num_new_tokens(self.max_model_len)
        return self._factory.make(request, limit if most_tokens is None else min(limit, most_tokens), index)

    def add(self, sequence: Sequence) -> None:
        """Let a prepared request take part from the next step on."""
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._scheduler.add(sequence)

    def cancel(self, request_id: str) -> list[SequenceEvent]:
        """End a request now, freeing its blocks: the last event of each of its sequences; unknown ids are no error."""
        mine = [one for one in self._sequences() if one.request.id == request_id]
        for sequence in mine:
            sequence.finish_reason = "cancelled"
            self._end(sequence)
        return [
            SequenceEvent(request_id=request_id, index=index, finish_reason="cancelled")
            for one in mine
            for index in one.indices
        ]

    def prepare_embedding(self, prompts: Iterable[Tokens[int]], adapter: str | None = None) -> EmbeddingJob:
        """Prompts to embed, checked; may be called from any thread.

        Raises:
            UserError: there is no prompt, one is empty or past the context, or a token id is unknown.
        """
        given = list(prompts)
        require_embeddable(given, self.max_model_len, self._runner.vocab_size)
        return EmbeddingJob(given, adapter)

    def embed(self, job: EmbeddingJob) -> None:
        """Let prepared prompts be embedded, a piece at each step."""
        self._embedder.add(job)

    def drop_embedding(self, job: EmbeddingJob) -> None:
        """Compute no more of a job."""
        self._embedder.drop(job)

    def uses_adapter(self, name: str) -> bool:
        """Whether a request that has not ended asked for an adapter."""
        return any(one.request.adapter == name for one in self._sequences()) or self._embedder.uses_adapter(name)

    def forget_prefixes(self) -> None:
        """Find no prefix again that is cached now: an adapter of that name may come to mean another."""
        self._blocks.forget_prefixes()

    def stats(self) -> EngineStats:
        """How busy it is, and what it has done since the start."""
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_blocks=self._blocks.num_blocks,
            num_free_blocks=self._blocks.num_free,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt + self._embedder.num_tokens,
            num_cached_tokens=self._scheduler.num_cached_tokens,
            num_new_tokens=self._num_new,
            num_preempted=self._scheduler.num_preempted,
            num_draft_tokens=self._num_drafts,
            num_accepted_tokens=self._num_accepted,
            step_s=self._step_s,
            model_s=self._model_s,
        )

    def step(self) -> list[SequenceEvent]:
        """Compute one step; what it added to each sequence that got a token. Nothing to do: no events."""
        began_s = time.perf_counter()
        if self._embedder.has_work:
            self._embedder.step()
        if self._drafter is not None:
            self._guess(self._drafter)
        plan = self._scheduler.plan()
        events: list[SequenceEvent] = []
        if plan.chunks:
            computes_s = time.perf_counter()
            for source, target in plan.copies:
                self._cache.copy(source, target)
            for chunk, rows in self._forward(plan, events):
                events += self._advance(chunk, rows)
            self._num_steps += 1
            if all(chunk.count - chunk.num_drafts == 1 for chunk in plan.chunks):
                self._cost.note(sum(chunk.count for chunk in plan.chunks), time.perf_counter() - computes_s)
        self._step_s += time.perf_counter() - began_s
        return events

    def _guess(self, drafter: Drafter) -> None:
        """Let sequences that wait for one token have guesses at it.

        Not at the first one, after which samples of one prompt part, nor where tokens may stand for parts of images.
        """
        ready = [one for one in self._scheduler.running if one.num_missing == 1 and one.new_ids]
        ready = [one for one in ready if not one.request.images]
        if not ready:
            return
        try:
            drafter.propose(ready, self._cost)
            for sequence in ready:
                sequence.draft_ids = sequence.draft_ids[: sequence.chooser.num_allowed(sequence.draft_ids)]
        except Exception:  # whatever a draft model may throw: answers come without it too
            _LOG.warning("no tokens are guessed any more: the drafter failed", exc_info=True)
            self._drafter = None

    def _forward(self, plan: Plan, events: list[SequenceEvent]) -> list[tuple[Chunk, NDArray[np.float32]]]:
        """The logits of each chunk. A failure ends the sequence that brings it about, whose event goes to `events`."""
        try:
            return self._compute(plan.chunks)
        except Exception as error:  # whatever a runner may throw: no sequence may take others with it
            if len(plan.chunks) == 1:
                events += self._fail(plan.chunks[0].sequence, error)
                return []
        done = []
        for chunk in plan.chunks:
            done += self._forward(Plan([chunk]), events)
        return done

    def _compute(self, chunks: list[Chunk]) -> list[tuple[Chunk, NDArray[np.float32]]]:
        counts = np.array([chunk.count for chunk in chunks])
        ends = np.cumsum(counts)
        token_ids: list[int] = []
        wanted: list[int] = []
        num_wanted = []
        for chunk, end in zip(chunks, ends.tolist(), strict=True):
            sequence, first = chunk.sequence, chunk.sequence.num_computed
            known = sequence.token_ids[first : first + chunk.count - chunk.num_drafts]
            token_ids += known
            token_ids += sequence.draft_ids[: chunk.num_drafts]
            num_rows = 1 + chunk.num_drafts if chunk.is_complete else 0
            if sequence.request.params.num_prompt_logprobs is not None and first < sequence.num_prompt - 1:
                num_rows = chunk.count
            wanted += range(end - num_rows, end)
            num_wanted.append(num_rows)
        firsts = np.array([chunk.sequence.num_computed for chunk in chunks])
        rows = np.arange(len(chunks), dtype=np.int32)
        width = max(len(chunk.sequence.blocks) for chunk in chunks)
        tables = np.zeros((len(chunks), width), dtype=np.int32)
        for row, chunk in enumerate(chunks):
            tables[row, : len(chunk.sequence.blocks)] = chunk.sequence.blocks
        requests = [chunk.sequence.request for chunk in chunks]
        images = [chunk.sequence.images for chunk in chunks]
        step = PagedStep(
            token_ids=np.array(token_ids, dtype=np.int32),
            positions=(np.arange(ends[-1]) - np.repeat(ends - counts - firsts, counts)).astype(np.int32),
            sequences=np.repeat(rows, counts),
            block_tables=tables,
            wanted=np.array(wanted, dtype=np.int32),
            adapters=[one.adapter for one in requests] if any(one.adapter for one in requests) else (),
            images=images if any(images) else (),
        )
        began_s = time.perf_counter()
        logits = self._cache.forward(step)
        self._model_s += time.perf_counter() - began_s
        return list(zip(chunks, np.split(logits, np.cumsum(num_wanted)[:-1]), strict=True))

    def _advance(self, chunk: Chunk, rows: NDArray[np.float32]) -> list[SequenceEvent]:
        """Take the logits of a chunk into account."""
        sequence = chunk.sequence
        first, is_complete = sequence.num_computed, chunk.is_complete
        sequence.num_computed += chunk.count - chunk.num_drafts
        self._num_prompt += max(0, min(sequence.num_computed, sequence.num_prompt) - first)
        num_top = sequence.request.params.num_prompt_logprobs
        if num_top is not None and first < sequence.num_prompt - 1:
            following = sequence.token_ids[first + 1 : sequence.num_prompt][: len(rows)]
            # In its place, not at the end: a prompt that was preempted is read again.
            sequence.prompt_logprobs[first:] = [
                token_logprob(row, token_id, num_top) for row, token_id in zip(rows, following, strict=False)
            ]
        self._scheduler.remember(sequence)
        if not is_complete:
            return []
        mine = [sequence, *self._fork(sequence)]
        rows = rows[-1 - chunk.num_drafts :]
        return [event for one in mine for event in self._guarded(one, lambda one=one: self._extend(one, rows))]  # type: ignore[misc]

    def _fork(self, parent: Sequence) -> list[Sequence]:
        """The other samples of a request whose prompt has just been read."""
        if parent.index or parent.new_ids or parent.is_forked:
            return []
        parent.is_forked = True
        children = []
        for index in range(1, parent.request.num_samples):
            child = self._factory.make(parent.request, parent.limit, index)
            child.arrival, child.is_forked = parent.arrival, True
            child.prompt_logprobs = parent.prompt_logprobs
            self._scheduler.fork(parent, child)
            children.append(child)
        return children

    def _extend(self, sequence: Sequence, rows: NDArray[np.float32]) -> SequenceEvent:
        """Choose the tokens behind what was computed: one, and as many more as were guessed right."""
        drafts, sequence.draft_ids = sequence.draft_ids[: len(rows) - 1], []
        is_first = not sequence.new_ids
        event = SequenceEvent(request_id=sequence.request.id, index=sequence.index)
        self._num_drafts += len(drafts)
        for row, draft in zip(rows, [*drafts, None], strict=True):
            chosen = sequence.chooser.choose(row, sequence.num_tokens, sequence.counts)
            num_appended = self._append(sequence, chosen, event)
            if sequence.finish_reason or num_appended > 1 or chosen.token_id != draft:
                break
            sequence.num_computed += 1  # the guess has its keys and values already
            self._num_accepted += 1
        self._scheduler.remember(sequence)
        if sequence.finish_reason:
            self._end(sequence)
        return replace(
            event,
            cached_tokens=sequence.cached_tokens,
            prompt_logprobs=sequence.prompt_logprobs if is_first and sequence.prompt_logprobs else None,
            finish_reason=sequence.finish_reason,
        )

    def _append(self, sequence: Sequence, chosen: NextToken, event: SequenceEvent) -> int:
        """Add a chosen token and what must follow it; how many that were."""
        ids, logprob = [chosen.token_id], chosen.logprob
        for number, token_id in enumerate(ids, 1):
            sequence.append(token_id)
            self._num_new += 1
            event.token_ids.append(token_id)
            if logprob is not None:  # what follows by force is certain
                event.logprobs.append(logprob if number == 1 else TokenLogprob(token_id=token_id, logprob=0.0))
            transcript = sequence.transcript
            num_calls = len(transcript.tool_calls)
            event.pieces.extend(transcript.push(token_id))
            if transcript.is_stopped:
                sequence.finish_reason = "stop"
            elif len(sequence.new_ids) == sequence.limit:
                sequence.finish_reason = "length"
            else:
                ids += sequence.chooser.follow(token_id)
                if sequence.chooser.is_finished:
                    sequence.finish_reason = "stop"
            if sequence.finish_reason and not transcript.is_stopped:
                event.pieces.extend(transcript.close())
            event.tool_calls.extend(transcript.tool_calls[num_calls:])
            if sequence.finish_reason:
                break
        return number

    def _guarded(self, sequence: Sequence, work: Callable[[], SequenceEvent]) -> list[SequenceEvent]:
        try:
            return [work()]
        except Exception as error:  # a grammar, a template's marks, damaged weights: one sequence's misfortune
            return self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: Exception) -> list[SequenceEvent]:
        sequence.finish_reason = "error"
        self._end(sequence)
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return [
            SequenceEvent(
                request_id=sequence.request.id, index=index, finish_reason="error", error=" ".join(text.split())
            )
            for index in sequence.indices
        ]

    def _end(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        if self._drafter is not None:
            self._drafter.forget(sequence)

    def _sequences(self) -> list[Sequence]:
        return [*self._scheduler.running, *self._scheduler.waiting]
