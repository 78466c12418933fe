"""Guesses of a smaller model that speaks with the same tokens: see `drafting.py`.

The draft model reads what each sequence has said, in blocks of its own, and goes on a few tokens from there, all
sequences together. What it reads is bounded in each step; a sequence that it has not read yet, or for which its cache
has no room, gets no guesses and loses nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from openbook.core.errors import UserError
from openbook.engine.block_manager import BlockManager
from openbook.engine.drafting import HitRate, StepCost
from openbook.engine.paged import BLOCK_TOKENS, PagedRunner, PagedStep
from openbook.engine.sampler import penalise, sample_one
from openbook.engine.sequence import Sequence

# How right guesses are taken to be before there are any, and what one costs: this share of a step of the other model.
# In each step without guesses, what was learnt comes a little nearer to these, so that those that were not worth it are
# tried again.
_START_RATE = 0.8
_START_COST = 0.25
_FADING = 1 / 64
# How much one step changes what a guess costs, and how many times the usual it may seem to: see `StepCost`.
_STEP_WEIGHT = 1 / 8
_LONGEST_GUESS = 3.0


@dataclass(eq=False)
class _Reading:
    """How far the draft model has read one sequence."""

    sequence: Sequence
    rate: HitRate
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose keys and values are in the draft model's cache
    num_remembered: int = 0  # full blocks that others may find
    count: int = 0  # guesses to make now
    guesses: list[int] = field(default_factory=list)
    num_before: int = 0  # tokens of the sequence when they were made

    @property
    def num_missing(self) -> int:
        """Tokens to read before the next one can be guessed."""
        return self.sequence.num_tokens - self.num_computed


class ModelDrafter:
    """Guesses with a model.

    Args:
        runner: the draft model's.
        vocab_size: number of logits of the model that it guesses for; either may have some that stand for no token.
        num_draft_tokens: most guesses at a time.
        num_blocks: of the draft model's cache.
        max_step_tokens: most tokens that it reads in one step.

    Raises:
        UserError: the cache is too small for a single block.
    """

    def __init__(
        self,
        runner: PagedRunner,
        vocab_size: int,
        *,
        num_draft_tokens: int,
        num_blocks: int,
        max_step_tokens: int = 256,
    ) -> None:
        if num_blocks < 1:
            raise UserError(
                f"the cache leaves no block of {runner.block_bytes:,} bytes to the draft model: give it more memory"
            )
        self._runner, self._vocab_size = runner, vocab_size
        self._most, self._max_step_tokens = num_draft_tokens, max_step_tokens
        self._cache = runner.paged_cache(num_blocks)
        self._blocks = BlockManager(num_blocks)
        self._readings: dict[Sequence, _Reading] = {}
        self._rate = HitRate(_START_RATE)  # of all sequences; a new one starts with it
        self._guess_s: float | None = None  # seconds of one guess

    def propose(self, sequences: Tokens[Sequence], cost: StepCost) -> None:
        """See `Drafter.propose`."""
        began_s = time.perf_counter()
        overhead = cost.overhead / len(sequences)
        guess_cost = 1.0 + self._cost(overhead, cost.token_s)  # of making it, and of checking it
        wanted = []
        for sequence in sequences:
            reading = self._readings.get(sequence)
            if reading is None:
                reading = self._readings[sequence] = _Reading(sequence, HitRate(self._rate.value))
            self._settle(reading)
            room = self._runner.max_model_len - sequence.num_tokens + 1
            most = min(self._most, sequence.max_drafts, room)
            reading.count = reading.rate.num_worthwhile(most, overhead, guess_cost)
            if reading.count:
                wanted.append(reading)
            else:
                _fade(reading.rate)
        chosen = set(wanted)
        idle = [reading for reading in self._readings.values() if reading not in chosen]
        parts = self._next_parts([reading for reading in wanted if self._reserve(reading, idle)])
        num_guesses = self._guess(self._read(parts))
        if num_guesses == 0:
            self._fade()
        elif all(len(ids) <= 2 for _, ids in parts):  # nothing was caught up on
            self._learn((time.perf_counter() - began_s) / num_guesses)

    def forget(self, sequence: Sequence) -> None:
        """See `Drafter.forget`."""
        reading = self._readings.pop(sequence, None)
        if reading is not None:
            self._release(reading)

    def _cost(self, overhead: float, token_s: float) -> float:
        """Of making a guess, in tokens of a step of the other model."""
        if self._guess_s is None or token_s == 0:
            return _START_COST * (1.0 + overhead)
        return self._guess_s / token_s

    def _learn(self, guess_s: float) -> None:
        if self._guess_s is None:
            self._guess_s = guess_s
        self._guess_s += (min(guess_s, _LONGEST_GUESS * self._guess_s) - self._guess_s) * _STEP_WEIGHT

    def _fade(self) -> None:
        _fade(self._rate)
        if self._guess_s is not None:
            self._guess_s *= 1 - _FADING

    def _settle(self, reading: _Reading) -> None:
        """See which guesses were right, and take back what was computed of the others."""
        if not reading.guesses:
            return
        came = reading.sequence.token_ids[reading.num_before :]
        num_right = reading.rate.note(reading.guesses, came)
        self._rate.note(reading.guesses, came)
        # The last token is always read: what follows it is the next guess.
        last = reading.sequence.num_tokens - 1
        reading.num_computed = min(reading.num_computed, reading.num_before + num_right, last)
        reading.guesses = []

    def _reserve(self, reading: _Reading, idle: list[_Reading]) -> bool:
        """Blocks for all that is to be read and guessed; False if there are too few even without those of idle ones."""
        sequence = reading.sequence
        if reading.num_computed == 0:
            self._release(reading)  # meanwhile another sample may have read the same prompt
            num_reusable = (sequence.num_tokens - 1) // BLOCK_TOKENS
            reading.blocks = self._blocks.find(sequence.full_digests()[:num_reusable])
            reading.num_remembered = len(reading.blocks)
            reading.num_computed = len(reading.blocks) * BLOCK_TOKENS
        if max(sequence.token_ids[reading.num_computed :]) >= self._runner.vocab_size:
            self._release(reading)  # an id that this model has not, and that stands for no token
            return False
        # The last guess is not computed.
        needed = -(-(sequence.num_tokens + reading.count - 1) // BLOCK_TOKENS) - len(reading.blocks)
        if needed > self._blocks.num_free:
            for other in idle:
                self._release(other)
        if needed > self._blocks.num_free:
            self._release(reading)
            return False
        for _ in range(needed):
            block = self._blocks.allocate()
            assert block is not None, "it was found to be free"
            reading.blocks.append(block)
        return True

    def _next_parts(self, readings: list[_Reading]) -> list[tuple[_Reading, list[int]]]:
        """What to read now of each sequence, the shortest rest first."""
        budget = self._max_step_tokens
        parts = []
        for reading in sorted(readings, key=lambda one: one.num_missing):
            count = min(reading.num_missing, budget)
            if count:
                start = reading.num_computed
                parts.append((reading, reading.sequence.token_ids[start : start + count]))
                budget -= count
        return parts

    def _read(self, parts: list[tuple[_Reading, list[int]]]) -> list[tuple[_Reading, NDArray[np.float32]]]:
        """Read; those that are at their end then, with the logits there."""
        rows = self._forward(parts)
        for reading, _ in parts:
            self._remember(reading)
        return [(one, row) for (one, _), row in zip(parts, rows, strict=True) if one.num_missing == 0]

    def _guess(self, active: list[tuple[_Reading, NDArray[np.float32]]]) -> int:
        """Guess on from those logits, one token of every sequence at a time; how many tokens that gave."""
        done = [reading for reading, _ in active]
        for reading in done:
            reading.num_before = reading.sequence.num_tokens
        while active:
            for reading, row in active:
                reading.guesses.append(_choose(reading, self._fitted(row)))
            going = [reading for reading, _ in active if len(reading.guesses) < reading.count]
            rows = self._forward([(reading, reading.guesses[-1:]) for reading in going])
            active = list(zip(going, rows, strict=True))
        for reading in done:
            reading.sequence.draft_ids = list(reading.guesses)
        return sum(len(reading.guesses) for reading in done)

    def _forward(self, parts: list[tuple[_Reading, list[int]]]) -> NDArray[np.float32]:
        """The logits after the last token of each part, float32 [parts, V]; the parts are computed then."""
        if not parts:
            return np.empty((0, self._runner.vocab_size), dtype=np.float32)
        counts = np.array([len(ids) for _, ids in parts])
        firsts = np.array([reading.num_computed for reading, _ in parts])
        ends = np.cumsum(counts)
        tables = np.zeros((len(parts), max(len(reading.blocks) for reading, _ in parts)), dtype=np.int32)
        for row, (reading, _) in enumerate(parts):
            tables[row, : len(reading.blocks)] = reading.blocks
        step = PagedStep(
            token_ids=np.concatenate([np.array(ids, dtype=np.int32) for _, ids in parts]),
            positions=(np.arange(ends[-1]) - np.repeat(ends - counts - firsts, counts)).astype(np.int32),
            sequences=np.repeat(np.arange(len(parts), dtype=np.int32), counts),
            block_tables=tables,
            wanted=(ends - 1).astype(np.int32),
        )
        logits = self._cache.forward(step)
        for reading, ids in parts:
            reading.num_computed += len(ids)
        return logits

    def _fitted(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        """As many logits as the other model has.

        Raises:
            UserError: they are not numbers.
        """
        if not np.isfinite(row.max()):
            raise UserError("the draft model's logits are not finite: its weights are damaged; take another")
        if len(row) == self._vocab_size:
            return row
        fitted = np.full(self._vocab_size, -np.inf, dtype=np.float32)
        fitted[: len(row)] = row[: self._vocab_size]
        return fitted

    def _remember(self, reading: _Reading) -> None:
        """Let other sequences, and this one after a pause, find what has been read: no guess is among it."""
        num_full = reading.num_computed // BLOCK_TOKENS
        digests = reading.sequence.full_digests()
        for number in range(reading.num_remembered, num_full):
            self._blocks.remember(reading.blocks[number], digests[number])
        reading.num_remembered = num_full

    def _release(self, reading: _Reading) -> None:
        for block in reversed(reading.blocks):
            self._blocks.release(block)
        reading.blocks, reading.num_computed, reading.num_remembered = [], 0, 0


def _fade(rate: HitRate) -> None:
    rate.value += (_START_RATE - rate.value) * _FADING


def _choose(reading: _Reading, logits: NDArray[np.float32]) -> int:
    """What the sequence would draw, with its penalties and its random number, if these were its logits float32 [V]."""
    sequence, params = reading.sequence, reading.sequence.request.params
    if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1 or params.logit_bias:
        logits = logits.copy()
        counts = sequence.counts.copy()
        counts.update(reading.guesses)
        penalise(logits, params, np.array(sequence.request.prompt_ids), counts)
    if params.is_greedy:
        return int(logits.argmax())
    return sample_one(logits, params, sequence.num_tokens + len(reading.guesses), sequence.index)
