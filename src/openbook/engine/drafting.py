"""Guessing what a sequence says next, for the engine to check several tokens in one step (arXiv 2211.17192).

A guess is kept exactly where it is the token that the sequence would have drawn anyway: guesses change how soon an
answer comes, and nothing in it. This file works out how many are worth their cost, and looks them up in the sequence's
own text; `draft_model.py` asks a smaller model.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens

from openbook.engine.sequence import Sequence

# Tokens that must have been said before for what followed them to be a guess; the longest is tried first.
_LENGTHS = (4, 3, 2)

# How much one guess, right or wrong, changes the share that is right.
_GUESS_WEIGHT = 1 / 8

# How much one step changes what steps cost, and how many times the usual a step may seem to take: other processes
# disturb the clock.
_STEP_WEIGHT = 1 / 32
_LONGEST_STEP = 3.0

# Until steps of several sizes have been timed. Measured on two Zen 4 cores, by weights: 1.5 in 4 bits, 8 in 16.
_USUAL_OVERHEAD = 2.0
_MOST_OVERHEAD = 1000.0


class StepCost:
    """What a step costs: so much in any case (reading the weights above all), and so much for each token.

    A line through the times of the steps, seconds = token_s * (overhead + tokens); old ones count less and less.
    """

    def __init__(self) -> None:
        self._num_steps = 0
        self._tokens = self._seconds = 0.0  # means
        self._variance = self._covariance = 0.0  # of the tokens, of both

    def note(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        self._num_steps += 1
        if self._num_steps > 1:
            seconds = min(seconds, _LONGEST_STEP * self._seconds)
        weight = max(_STEP_WEIGHT, 1 / self._num_steps)
        more = num_tokens - self._tokens
        self._tokens += weight * more
        self._variance = (1 - weight) * (self._variance + weight * more * more)
        self._covariance = (1 - weight) * (self._covariance + weight * more * (seconds - self._seconds))
        self._seconds += weight * (seconds - self._seconds)

    @property
    def overhead(self) -> float:
        """What a step costs in any case, in tokens."""
        if self._variance < 0.25:  # all steps of one size: they do not tell
            return _USUAL_OVERHEAD
        token_s = self._covariance / self._variance
        fixed_s = max(0.0, self._seconds - token_s * self._tokens)
        return fixed_s / token_s if token_s * _MOST_OVERHEAD > fixed_s else _MOST_OVERHEAD

    @property
    def token_s(self) -> float:
        """Seconds of one more token; 0 before the first step."""
        return self._seconds / (self.overhead + self._tokens) if self._num_steps else 0.0


class HitRate:
    """The share of guesses that were right lately."""

    def __init__(self, value: float = 0.5) -> None:
        self.value = value

    def note(self, guesses: Tokens[int], tokens: Tokens[int]) -> int:
        """Compare guesses with what came; how many were right before the first wrong one, as far as there are both."""
        num_right = 0
        for guess, token in zip(guesses, tokens, strict=False):
            self.value += ((guess == token) - self.value) * _GUESS_WEIGHT
            if guess != token:
                break
            num_right += 1
        return num_right

    def num_worthwhile(self, most: int, overhead: float, cost: float = 1.0) -> int:
        """How many tokens to guess at a time so that a token costs least.

        With k guesses a step brings 1 + p + ... + p^k tokens, p being this rate, and costs as much as 1 + overhead + k
        cost tokens. As each guess adds less than the one before it, k is reached when the next one adds fewer tokens
        for its cost than all have brought so far.

        Args:
            most: of them.
            overhead: what a step costs beside its tokens, in tokens: this sequence's share of it.
            cost: of making and checking a guess, in tokens of a step.
        """
        tokens, total, chance = 1.0, 1.0 + overhead, self.value
        for number in range(most):
            if chance * total < tokens * cost:
                return number
            tokens, total, chance = tokens + chance, total + cost, chance * self.value
        return max(0, most)


class NgramDrafter:
    """Guesses that a sequence goes on as it did after the same few tokens before, in prompt or answer.

    Args:
        num_draft_tokens: most guesses at a time.
    """

    def __init__(self, num_draft_tokens: int) -> None:
        self._most = num_draft_tokens
        self._texts: dict[Sequence, _Text] = {}

    def propose(self, sequences: Tokens[Sequence], cost: StepCost) -> None:
        """See `Drafter.propose`."""
        overhead = cost.overhead / len(sequences)
        for sequence in sequences:
            text = self._texts.get(sequence)
            if text is None:
                text = self._texts[sequence] = _Text()
            sequence.draft_ids = text.guess(sequence.token_ids, min(self._most, sequence.max_drafts), overhead)

    def forget(self, sequence: Sequence) -> None:
        """See `Drafter.forget`."""
        self._texts.pop(sequence, None)


class _Text:
    """What one sequence has said, by its n-grams."""

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], int] = {}  # n-gram to the place behind its latest occurrence
        self._num_read = min(_LENGTHS)
        self._rates = {length: HitRate() for length in _LENGTHS}
        self._guesses: list[int] = []
        self._num_before = self._length = 0  # tokens when they were made, and of the n-gram

    def guess(self, token_ids: Tokens[int], most: int, overhead: float) -> list[int]:
        """Up to `most` tokens that may follow."""
        if self._guesses:
            self._rates[self._length].note(self._guesses, token_ids[self._num_before :])
            self._guesses = []
        for place in range(self._num_read, len(token_ids)):
            for length in _LENGTHS:
                if length <= place:
                    self._next[tuple(token_ids[place - length : place])] = place
        self._num_read = max(self._num_read, len(token_ids))
        for length in _LENGTHS:
            place = self._next.get(tuple(token_ids[-length:]), 0)
            if place:
                count = self._rates[length].num_worthwhile(most, overhead)
                # Where none is worth it, one is made all the same, to see whether it would have been right.
                self._guesses = _copy(token_ids, place, max(1, count))
                self._num_before, self._length = len(token_ids), length
                return self._guesses[:count]
        return []


def _copy(token_ids: Tokens[int], place: int, count: int) -> list[int]:
    """The `count` tokens from a place on; behind the last token, those copied so far."""
    copied: list[int] = []
    for index in range(place, place + count):
        copied.append(token_ids[index] if index < len(token_ids) else copied[index - len(token_ids)])
    return copied
