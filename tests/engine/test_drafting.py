"""Speculative decoding: whatever is guessed, an answer is the one without any guess, to the bit where it is exact."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drafters import (
    ANY_PRICE,
    GREEDY,
    WAYS,
    Eager,
    Fallible,
    FixedCost,
    Said,
    guessing_engine,
    is_idle,
    plain,
    said,
    ways,
)
from engine_setup import make_engine, run, tokens

from openbook.checkpoint.locate import locate
from openbook.checkpoint.model_source import open_model
from openbook.core.errors import UserError
from openbook.engine.block_manager import BlockManager
from openbook.engine.drafting import HitRate, NgramDrafter, StepCost, _Text
from openbook.engine.engine import Engine, EngineSettings
from openbook.engine.model import Model
from openbook.engine.paged import BLOCK_TOKENS
from openbook.engine.request import Constraint, Request, SamplingParams
from openbook.engine.scheduler import Scheduler
from openbook.engine.sequence import Sequence
from openbook.engine.sequence_factory import SequenceFactory
from openbook.engine.torch_runner import load_runner

CROWDING: list[dict[str, object]] = [
    {"max_running": 32},
    {"max_running": 4, "max_step_tokens": 9},
    {"max_running": 32, "num_blocks": 14},
    {"max_running": 32, "num_blocks": 14, "max_step_tokens": 20, "has_prefix_cache": False},
]


@pytest.fixture(scope="module")
def expected(tiny_folder: Path) -> dict[tuple[str, int], Said]:
    return plain(tiny_folder, ways(24))


@pytest.mark.parametrize("crowding", CROWDING, ids=["roomy", "small steps", "few blocks", "few blocks, no prefixes"])
@pytest.mark.parametrize("chance", [0.15, 0.6, 1.0], ids=["mostly right", "often wrong", "always wrong"])
def test_guesses_change_nothing(
    tiny_folder: Path, expected: dict[tuple[str, int], Said], crowding: dict[str, object], chance: float
) -> None:
    answers = {key: one.token_ids for key, one in expected.items()}
    engine = guessing_engine(tiny_folder, Fallible(answers, chance, 6, 274), **crowding)  # type: ignore[arg-type]
    found = run(engine, ways(24))
    assert {key: said(events) for key, events in found.items()} == expected
    assert is_idle(engine)
    stats = engine.stats()
    assert stats.num_draft_tokens > 100
    if chance < 1:
        assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
        if "max_step_tokens" not in crowding:
            assert any(len(event.token_ids) > 3 for events in found.values() for event in events)
    if "num_blocks" in crowding:
        assert stats.num_preempted > 0


@pytest.mark.parametrize("crowding", CROWDING, ids=["roomy", "small steps", "few blocks", "few blocks, no prefixes"])
def test_looking_up_changes_nothing(
    tiny_folder: Path, expected: dict[tuple[str, int], Said], crowding: dict[str, object]
) -> None:
    drafter = NgramDrafter(8)
    engine = guessing_engine(tiny_folder, Eager(drafter), **crowding)  # type: ignore[arg-type]
    found = run(engine, ways(24))
    assert {key: said(events) for key, events in found.items()} == expected
    assert 0 < engine.stats().num_accepted_tokens < engine.stats().num_draft_tokens
    assert not drafter._texts, "something is kept of sequences that have ended"


def test_the_torch_runner_checks_guesses_too(tiny_folder: Path, expected: dict[tuple[str, int], Said]) -> None:
    """In the profile fast; what a token's logits are differs from one shape of a step to another in last bits only."""
    source = open_model(tiny_folder)
    runner = load_runner(source, "cpu", "float32")
    answers = {key: one.token_ids for key, one in expected.items()}
    settings = EngineSettings(cache_bytes=14 * runner.block_bytes, max_step_tokens=40)
    factory = SequenceFactory(source.chat(), runner.vocab_size)
    engine = Engine(runner, factory, settings, Fallible(answers, 0.3, 6, 274))
    found = run(engine, [one for one in ways(24) if one.params.is_greedy])
    assert {key: tokens(events) for key, events in found.items()} == {key: answers[key] for key in found}
    assert len(found) >= 6
    stats = engine.stats()
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens


@pytest.mark.parametrize("way", ["greedy", "sampled", "penalised", "logprobs"])
def test_nano_solves_its_tasks_in_fewer_steps_and_the_same_tokens(way: str) -> None:
    model = Model.load("nano")
    questions = ["What is 48 plus 57? Give only the result.", "Reverse: openbook", "gcd of 84, 36 and 60?"]
    params = replace(WAYS[way], ignore_eos=False, max_tokens=150)
    asked = [
        Request(prompt_ids=model.prompt_ids(text), params=replace(params, seed=index), id=text)
        for index, text in enumerate(questions)
    ]
    folder = locate("nano")
    without, with_drafts = make_engine(folder), guessing_engine(folder, Eager(NgramDrafter(8)))
    expected = {key: said(events) for key, events in run(without, asked).items()}
    assert {key: said(events) for key, events in run(with_drafts, asked).items()} == expected
    if way == "greedy":
        assert with_drafts.stats().num_steps < 0.7 * without.stats().num_steps


@pytest.mark.parametrize("budget", [0, 5, 40])
def test_thinking_ends_where_its_budget_does(budget: int) -> None:
    model = Model.load("nano")
    prompt = model.prompt_ids("What is 48 plus 57? Give only the result.")
    params = SamplingParams(max_tokens=120, thinking_budget=budget, num_logprobs=1)
    asked = [Request(prompt_ids=prompt, params=params, id="a")]
    folder = locate("nano")
    expected = plain(folder, asked)
    answers = {key: one.token_ids for key, one in expected.items()}
    for drafter in (Eager(NgramDrafter(8)), Fallible(answers, 0.2, 6, 770)):
        engine = guessing_engine(folder, drafter)
        assert said(run(engine, asked)["a", 0]) == expected["a", 0]


def test_an_answer_obeys_its_grammar_in_fewer_steps(tiny_folder: Path) -> None:
    constraint = Constraint(kind="regex", source=r'(\{"name": "[a-d]{3}", "plus": 17\}, ){4}')
    asked = [
        Request(prompt_ids=[1, 2, 3], params=replace(WAYS[way], max_tokens=120, constraint=constraint), id=way)
        for way in ("greedy", "sampled")
    ]
    expected = plain(tiny_folder, asked)
    engine = guessing_engine(tiny_folder, Eager(NgramDrafter(8)))
    assert {key: said(events) for key, events in run(engine, asked).items()} == expected
    assert engine.stats().num_accepted_tokens > 20


class Always:
    """Guesses for whoever it is asked for, and far too much."""

    def __init__(self) -> None:
        self.asked: list[Sequence] = []

    def propose(self, sequences: Tokens[Sequence], cost: StepCost) -> None:
        for sequence in sequences:
            self.asked.append(sequence)
            sequence.draft_ids = [5] * 500

    def forget(self, sequence: Sequence) -> None:
        pass


def test_no_guess_at_the_first_token_where_samples_part(tiny_folder: Path) -> None:
    """Of a prompt whose last token is computed by itself."""
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=20, ignore_eos=True)
    prompt = list(range(BLOCK_TOKENS - 1))
    asked = [Request(prompt_ids=prompt, params=params, id="n", num_samples=4)]
    expected = plain(tiny_folder, asked)
    answers = {key: one.token_ids for key, one in expected.items()}
    engine = guessing_engine(tiny_folder, Fallible(answers, 0.0, 6, 274), max_step_tokens=len(prompt) - 1)
    assert {key: said(events) for key, events in run(engine, asked).items()} == expected
    assert engine.stats().num_accepted_tokens > 40


def test_nothing_is_computed_behind_the_end(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Always()
    engine = guessing_engine(tiny_folder, drafter, max_step_tokens=512, max_model_len=100)
    highest = []
    forward = engine._cache.forward

    def note(step):  # type: ignore[no-untyped-def]
        highest.append(int(step.positions.max()))
        return forward(step)

    monkeypatch.setattr(engine._cache, "forward", note)
    run(engine, [Request(prompt_ids=[1, 2, 3], params=replace(GREEDY, max_tokens=None), id="context")])
    assert max(highest) == 98, "the last token of a context of 100 is not computed"
    highest.clear()
    run(engine, [Request(prompt_ids=[1, 2, 3], params=replace(GREEDY, max_tokens=10), id="limit")])
    assert max(highest) == 3 + 10 - 2
    assert len(drafter.asked) > 50


def test_rejected_guesses_are_not_taken_for_a_prefix(tiny_folder: Path) -> None:
    prompt = list(range(30, 30 + BLOCK_TOKENS - 2))
    request = Request(prompt_ids=prompt, params=replace(GREEDY, max_tokens=40), id="a")
    without = make_engine(tiny_folder)
    answer = tokens(run(without, [request])["a", 0])
    longer = Request(prompt_ids=[*prompt, *answer], params=replace(GREEDY, max_tokens=20), id="b")
    expected = run(without, [longer])["b", 0]
    for chance in (0.3, 1.0):
        engine = guessing_engine(tiny_folder, Fallible({("a", 0): answer}, chance, 9, 274))
        assert tokens(run(engine, [request])["a", 0]) == answer
        engine._drafter = None
        again = run(engine, [longer])["b", 0]
        assert tokens(again) == tokens(expected)
        assert again[0].cached_tokens == expected[0].cached_tokens > BLOCK_TOKENS


def test_a_drafter_that_fails_costs_no_answer(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Always):
        def propose(self, sequences: Tokens[Sequence], cost: StepCost) -> None:
            if len(self.asked) > 9:
                raise RuntimeError("out of luck")
            super().propose(sequences, cost)

    asked = ways(6)
    engine = guessing_engine(tiny_folder, Failing())
    with caplog.at_level(logging.WARNING):
        found = run(engine, asked)
    assert {key: said(events) for key, events in found.items()} == plain(tiny_folder, asked)
    assert [record.message for record in caplog.records] == ["no tokens are guessed any more: the drafter failed"]


def test_a_prompt_that_is_read_again_has_its_logprobs_once(tiny_folder: Path) -> None:
    params = replace(GREEDY, max_tokens=30, num_prompt_logprobs=0)
    slow = Request(prompt_ids=list(range(100)), params=params, id="slow", priority=1)
    engine = make_engine(tiny_folder, max_step_tokens=16, max_running=1)
    engine.add(engine.prepare(slow))
    engine.step()
    engine.step()
    engine.add(engine.prepare(Request(prompt_ids=[1, 2], params=GREEDY, id="urgent")))
    found = [event for _ in range(200) for event in engine.step() if event.request_id == "slow"]
    assert engine.stats().num_preempted == 1
    assert said(found) == plain(tiny_folder, [slow])["slow", 0]


def sequences(tiny_folder: Path, lengths: list[int]) -> list[Sequence]:
    engine = make_engine(tiny_folder)
    made = []
    for index, length in enumerate(lengths):
        params = SamplingParams(max_tokens=50)
        made.append(engine.prepare(Request(prompt_ids=[1] * length, params=params, id=str(index))))
        made[-1].arrival = index
    return made


def test_drafts_take_what_nobody_needs(tiny_folder: Path) -> None:
    scheduler = Scheduler(BlockManager(8), max_running=8, max_step_tokens=12)
    running = sequences(tiny_folder, [4, 4, 4])
    for sequence in running:
        scheduler.add(sequence)
    scheduler.plan()
    for sequence in running:
        sequence.num_computed = 4
        sequence.append(1)
        sequence.draft_ids = [1] * 20
    # 3 tokens for the sequences, the other 9 for drafts.
    plan = scheduler.plan()
    assert [(chunk.count, chunk.num_drafts) for chunk in plan.chunks] == [(4, 3)] * 3
    # With a prompt that waits, half of the 9.
    scheduler.add(sequences(tiny_folder, [30])[0])
    plan = scheduler.plan()
    assert [(chunk.count, chunk.num_drafts) for chunk in plan.chunks] == [(2, 1), (2, 1), (3, 2), (5, 0)]
    # Nor more than are left of an answer.
    running[0].limit, running[1].limit = 1, 3
    plan = scheduler.plan()
    assert [chunk.num_drafts for chunk in plan.chunks][:2] == [0, 1]


def test_drafts_take_no_blocks_from_others(tiny_folder: Path) -> None:
    scheduler = Scheduler(BlockManager(3), max_running=8, max_step_tokens=100)
    running = sequences(tiny_folder, [14, 14])
    for sequence in running:
        scheduler.add(sequence)
    scheduler.plan()
    for sequence in running:
        sequence.num_computed = 14
        sequence.append(1)
        sequence.draft_ids = [1] * 20
    # One block is free: 17 drafts fit for the first, and what is left of its own for the second.
    plan = scheduler.plan()
    assert [chunk.num_drafts for chunk in plan.chunks] == [17, 1]
    assert not plan.preempted


def propose(drafter: NgramDrafter, sequence: Sequence, cost: StepCost = ANY_PRICE) -> list[int]:
    drafter.propose([sequence], cost)
    return sequence.draft_ids


def test_the_longest_match_is_looked_up_and_the_latest(tiny_folder: Path) -> None:
    drafter = NgramDrafter(4)
    sequence = sequences(tiny_folder, [1])[0]
    for said_now, expected in [
        ([7, 8, 9, 1, 2], []),
        ([30, 7, 8], [9, 1, 2, 30]),  # after the latest 7 8, and not with what was not said yet
        ([50, 8, 9], [1, 2, 30, 7]),
        ([60, 7, 8], [50, 8, 9, 60]),  # 7 8 again: what followed it last
        ([9, 1], [2, 30, 7, 8]),  # 7 8 9 1 in one piece; after 9 1 alone it was the same
        ([99], []),
    ]:
        for token_id in said_now:
            sequence.append(token_id)
        assert propose(drafter, sequence) == expected, said_now


def test_what_repeats_is_guessed_to_go_on(tiny_folder: Path) -> None:
    drafter = NgramDrafter(7)
    sequence = sequences(tiny_folder, [1])[0]
    for token_id in [5, 6, 7, 5, 6, 7]:
        sequence.append(token_id)
    assert propose(drafter, sequence) == [5, 6, 7, 5, 6, 7, 5]


def test_a_text_read_in_pieces_is_searched_as_a_whole() -> None:
    """Against a plain search from the end."""
    draw = np.random.default_rng(9)
    for _ in range(150):
        ids, most = draw.integers(0, draw.integers(2, 6), draw.integers(1, 60)).tolist(), int(draw.integers(1, 6))
        text, length = _Text(), 0
        while length < len(ids):
            length = min(len(ids), length + int(draw.integers(1, 8)))
            known = ids[:length]
            places = [
                place
                for size in (4, 3, 2)
                for place in range(length - 1, size - 1, -1)
                if length > size and known[place - size : place] == known[length - size :]
            ]
            expected = list(known)
            for index in range(most if places else 0):
                expected.append(expected[places[0] + index])
            assert text.guess(known, most, 1e9) == expected[length:]


def test_wrong_guesses_become_few_and_right_ones_many(tiny_folder: Path) -> None:
    drafter = NgramDrafter(8)
    sequence = sequences(tiny_folder, [1])[0]
    sequence.limit = 5000
    draw = np.random.default_rng(2)

    def num_guessed(ids: Iterable[int]) -> int:
        guessed = 0
        for token_id in ids:
            guessed += len(propose(drafter, sequence, FixedCost(2.0)))
            sequence.append(token_id)
        return guessed

    # Pairs return often among six tokens, and say nothing about what follows.
    num_guessed(draw.integers(0, 6, 40).tolist())
    assert num_guessed(draw.integers(0, 6, 400).tolist()) < 60
    num_guessed([10, 11, 12, 13, 14] * 12)
    assert num_guessed([10, 11, 12, 13, 14] * 20) > 300
    drafter.forget(sequence)
    assert not drafter._texts


def test_as_many_guesses_as_make_a_token_cheapest() -> None:
    draw = np.random.default_rng(6)
    chosen = set()
    for _ in range(300):
        rate, overhead, cost, most = draw.random(), draw.exponential(5), 1 + draw.exponential(0.5), draw.integers(0, 12)

        def token_cost(count: int) -> float:
            return (1 + overhead + count * cost) / sum(rate**power for power in range(count + 1))  # noqa: B023

        count = HitRate(rate).num_worthwhile(int(most), overhead, cost)
        assert token_cost(count) == pytest.approx(min(token_cost(other) for other in range(most + 1)))
        chosen.add(count)
    assert chosen >= set(range(8))
    assert HitRate(1.0).num_worthwhile(-1, 5.0) == 0


def test_the_hit_rate_follows_what_happens() -> None:
    rate = HitRate()
    assert rate.note([1, 2, 3], [1, 2, 4, 5]) == 2
    assert rate.note([1, 2, 3], [1]) == 1, "no more came"
    assert rate.note([], [1]) == rate.note([1], []) == 0
    for _ in range(40):
        rate.note([1], [2])
    assert rate.value < 0.01
    for _ in range(10):
        rate.note([1] * 4, [1] * 5)
    assert rate.value > 0.95


def test_the_cost_of_a_step_is_learnt_from_its_times() -> None:
    draw = np.random.default_rng(4)
    cost = StepCost()
    assert (cost.overhead, cost.token_s) == (2.0, 0.0)
    cost.note(1, 5.0)
    cost.note(1, 0.006)
    assert cost.overhead == 2.0, "steps of one size do not tell"
    assert cost.token_s == pytest.approx((5.0 + 0.006) / 2 / 3)
    for num_tokens in draw.integers(1, 9, 400).tolist():
        seconds = 0.006 + 0.001 * num_tokens
        cost.note(num_tokens, seconds * draw.uniform(0.9, 1.1) * (40 if draw.random() < 0.02 else 1))
    assert 3 < cost.overhead < 12
    assert 0.0007 < cost.token_s < 0.0015
    for num_tokens in draw.integers(1, 9, 400).tolist():
        cost.note(num_tokens, 0.01 + 1e-9 * draw.random())
    assert cost.overhead > 500, "as on a machine that computes eight as fast as one"
    for num_tokens in draw.integers(1, 9, 400).tolist():
        cost.note(num_tokens, 0.001 * num_tokens)
    assert cost.overhead == pytest.approx(0, abs=0.1)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match="num_draft_tokens is -1: expected 0 or more; correct that value"):
        EngineSettings(num_draft_tokens=-1)
    with pytest.raises(UserError, match="the draft model nano is given and num_draft_tokens is 0: expected 1 or more"):
        EngineSettings(draft_model="nano")
