"""For tests of speculative decoding: drafters that guess at any price, and what must not change."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from engine_setup import make_engine, run

from openbook.engine.drafting import StepCost
from openbook.engine.engine import Drafter, Engine
from openbook.engine.events import SequenceEvent, TokenLogprob
from openbook.engine.request import Request, SamplingParams
from openbook.engine.sequence import Sequence
from openbook.engine.transcript import Piece

# What is asked in all ways that a request can be steered, beside grammars.
GREEDY = SamplingParams(max_tokens=30, ignore_eos=True)
WAYS = {
    "greedy": GREEDY,
    "sampled": replace(GREEDY, temperature=1.0),
    "filtered": replace(GREEDY, temperature=1.3, top_p=0.9, top_k=40, min_p=0.01),
    "penalised": replace(GREEDY, temperature=0.8, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
    "biased": replace(GREEDY, logit_bias=((7, 3.0), (9, -4.0)), frequency_penalty=0.2),
    "logprobs": replace(GREEDY, temperature=0.7, num_logprobs=3, num_prompt_logprobs=1),
    "stops": replace(GREEDY, stop=("e", "0"), temperature=1.0),
    "ends": SamplingParams(temperature=1.0, max_tokens=30, stop_ids=(40, 41, 42, 43, 44)),
}


class FixedCost(StepCost):
    """Steps of which each token takes `token_s` seconds, and the rest as long as `overhead` tokens."""

    overhead = 0.0  # type: ignore[assignment]
    token_s = 0.0  # type: ignore[assignment]

    def __init__(self, overhead: float, token_s: float = 1.0) -> None:
        self.overhead, self.token_s = overhead, token_s  # type: ignore[misc]


ANY_PRICE = FixedCost(1e9)  # steps cost the same whatever is in them


class Eager:
    """Lets a drafter guess at a price that is given."""

    def __init__(self, drafter: Drafter, cost: StepCost = ANY_PRICE) -> None:
        self._drafter, self._cost = drafter, cost

    def propose(self, sequences: Tokens[Sequence], cost: StepCost) -> None:
        self._drafter.propose(sequences, self._cost)

    def forget(self, sequence: Sequence) -> None:
        self._drafter.forget(sequence)


class Fallible:
    """Knows what sequences will say, and is often wrong: of `count` guesses at a time each one with a chance."""

    def __init__(self, answers: dict[tuple[str, int], list[int]], chance: float, count: int, vocab_size: int) -> None:
        self._answers, self._chance, self._count, self._vocab_size = answers, chance, count, vocab_size
        self._draw = np.random.default_rng(1)

    def propose(self, sequences: Tokens[Sequence], cost: StepCost) -> None:
        for sequence in sequences:
            coming = self._answers[sequence.request.id, sequence.index][len(sequence.new_ids) :]
            wrong = self._draw.integers(0, self._vocab_size, self._count).tolist()
            is_wrong = self._draw.random(self._count) < self._chance
            padded = [*coming, *wrong][: self._count]  # it guesses behind the end, too
            sequence.draft_ids = [
                bad if fails else good for good, bad, fails in zip(padded, wrong, is_wrong, strict=True)
            ]

    def forget(self, sequence: Sequence) -> None:
        pass


@dataclass
class Said:
    """All that a client sees of one sequence; two are equal if nothing differs in one bit."""

    token_ids: list[int]
    pieces: str
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[TokenLogprob] | None
    finish_reason: str | None


def said(events: Tokens[SequenceEvent]) -> Said:
    """The events of one sequence, taken together."""

    def text(pieces: Tokens[Piece]) -> str:
        return "".join(f"<{piece.kind}>{piece.text}" for piece in pieces)

    return Said(
        [token_id for event in events for token_id in event.token_ids],
        text([piece for event in events for piece in event.pieces]).replace("<answer>", ""),
        [one for event in events for one in event.logprobs],
        events[0].prompt_logprobs,
        events[-1].finish_reason,
    )


def plain(folder: Path, asked: list[Request]) -> dict[tuple[str, int], Said]:
    """What is said with no guess, each request alone, its prompt in one piece."""
    engine = make_engine(folder, max_step_tokens=512, has_prefix_cache=False)
    return {key: said(events) for one in asked for key, events in run(engine, [one]).items()}


def guessing_engine(folder: Path, drafter: Drafter | None, *, num_blocks: int = 64, **changes: object) -> Engine:
    """An engine of `make_engine` with a drafter."""
    engine = make_engine(folder, num_blocks=num_blocks, **changes)
    engine._drafter = drafter
    return engine


def repetitive_prompts(number: int, seed: int = 5) -> list[list[int]]:
    """Prompts of 3 to 60 tokens that say some things several times."""
    draw = np.random.default_rng(seed)
    phrases = [draw.integers(0, 250, 7).tolist() for _ in range(3)]
    return [
        [token_id for choice in draw.integers(0, 3, index % 7) for token_id in phrases[choice]]
        + draw.integers(0, 250, 3 + index).tolist()
        for index in range(number)
    ]


def ways(number: int) -> list[Request]:
    """Requests of all `WAYS` in turn, some with several samples."""
    return [
        Request(
            prompt_ids=prompt,
            params=replace(list(WAYS.values())[index % len(WAYS)], seed=index),
            id=f"{index}",
            num_samples=3 if index % 5 == 2 else 1,
        )
        for index, prompt in enumerate(repetitive_prompts(number))
    ]


def is_idle(engine: Engine) -> bool:
    """Whether nothing runs, and all blocks are free."""
    stats = engine.stats()
    return stats.num_running == stats.num_waiting == 0 and stats.num_free_blocks == stats.num_blocks
