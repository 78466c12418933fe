"""The engine: whatever shares a step with a request, its answer is the one it gets alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_setup import make_engine, run, runner_of, tokens

from openbook.core.errors import UserError
from openbook.engine.engine import Engine, EngineSettings
from openbook.engine.model import Model
from openbook.engine.paged import BLOCK_TOKENS
from openbook.engine.request import Request, SamplingParams

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=11, max_tokens=24)


def prompts(number: int, seed: int = 3) -> list[list[int]]:
    """Prompts of 2 to 90 tokens, some with a common beginning."""
    draw = np.random.default_rng(seed)
    prefix = draw.integers(0, 250, 40).tolist()
    return [
        (prefix if index % 2 else []) + draw.integers(0, 250, length).tolist()
        for index, length in enumerate(draw.integers(2, 50, number))
    ]


def requests(number: int, params: SamplingParams = GREEDY, **changes: object) -> list[Request]:
    return [
        Request(prompt_ids=prompt, params=replace(params, seed=index), id=str(index), **changes)  # type: ignore[arg-type]
        for index, prompt in enumerate(prompts(number))
    ]


def alone(folder: Path, asked: list[Request]) -> list[list[int]]:
    """Each request's tokens from an engine of its own that reads prompts in one piece."""
    engine = make_engine(folder, max_step_tokens=512, has_prefix_cache=False)
    return [tokens(run(engine, [request])[request.id, 0]) for request in asked]


def everything_is_free(engine: Engine) -> bool:
    stats = engine.stats()
    return stats.num_running == stats.num_waiting == 0 and stats.num_free_blocks == stats.num_blocks


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_running": 32},
        {"max_running": 3, "max_step_tokens": 7},
        {"max_running": 32, "num_blocks": 14},  # they crowd each other out
        {"max_running": 32, "num_blocks": 14, "max_step_tokens": 20, "has_prefix_cache": False},
    ],
    ids=["roomy", "small steps", "few blocks", "few blocks, no prefixes"],
)
def test_company_changes_nothing(tiny_folder: Path, params: SamplingParams, settings: dict[str, int]) -> None:
    asked = requests(20, params)
    engine = make_engine(tiny_folder, **settings)  # type: ignore[arg-type]
    found = run(engine, asked)
    assert [tokens(found[request.id, 0]) for request in asked] == alone(tiny_folder, asked)
    assert everything_is_free(engine)
    if "num_blocks" in settings:
        assert engine.stats().num_preempted > 0


def test_it_says_what_the_model_says(tiny_folder: Path) -> None:
    model = Model.load(tiny_folder)
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=30)
    answer = model.stream_with("What is 3 plus 4?", "medium", params)
    pieces = list(answer)
    ids = model.prompt_ids("What is 3 plus 4?")
    events = run(make_engine(tiny_folder), [Request(prompt_ids=ids, params=params, id="a")])["a", 0]
    assert tokens(events) == answer.answer.token_ids
    assert [piece for event in events for piece in event.pieces] == pieces
    assert events[-1].finish_reason == answer.answer.finish_reason
    assert all(event.finish_reason is None for event in events[:-1])


def test_a_prefix_is_computed_once(tiny_folder: Path) -> None:
    engine = make_engine(tiny_folder)
    prompt = list(range(3 * BLOCK_TOKENS + 5))
    first = run(engine, [Request(prompt_ids=prompt, params=GREEDY, id="first")])["first", 0]
    computed = engine.stats().num_prompt_tokens
    second = run(engine, [Request(prompt_ids=prompt, params=GREEDY, id="second")])["second", 0]
    assert tokens(first) == tokens(second)
    assert first[0].cached_tokens == 0
    assert second[0].cached_tokens == 3 * BLOCK_TOKENS
    assert engine.stats().num_prompt_tokens - computed == 5
    # An answer is a prefix too: the next turn of a conversation begins with it.
    longer = prompt + tokens(first)
    third = run(engine, [Request(prompt_ids=longer, params=GREEDY, id="third")])["third", 0]
    assert third[0].cached_tokens == (len(longer) - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def test_a_whole_cached_prompt_still_computes_its_last_token(tiny_folder: Path) -> None:
    engine = make_engine(tiny_folder)
    prompt = list(range(2 * BLOCK_TOKENS))
    first = run(engine, [Request(prompt_ids=prompt, params=GREEDY, id="first")])["first", 0]
    second = run(engine, [Request(prompt_ids=prompt, params=GREEDY, id="second")])["second", 0]
    assert second[0].cached_tokens == BLOCK_TOKENS
    assert tokens(first) == tokens(second)


@pytest.mark.parametrize("num_blocks", [64, 12])
def test_samples_of_one_prompt_share_it_and_part(tiny_folder: Path, num_blocks: int) -> None:
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=30, ignore_eos=True)
    prompt = list(range(37))  # ends inside a block, which every sample writes to
    engine = make_engine(tiny_folder, num_blocks=num_blocks)
    found = run(engine, [Request(prompt_ids=prompt, params=params, id="n", num_samples=4)])
    samples = [tuple(tokens(found["n", index])) for index in range(4)]
    assert len(set(samples)) == 4
    assert everything_is_free(engine)
    if num_blocks == 64:
        assert engine.stats().num_prompt_tokens == len(prompt)
    # Sample 0 is what one sample alone is, and no other sample depends on how many there are.
    two = run(make_engine(tiny_folder), [Request(prompt_ids=prompt, params=params, id="n", num_samples=2)])
    assert [tuple(tokens(two["n", index])) for index in range(2)] == samples[:2]
    one = run(make_engine(tiny_folder), [Request(prompt_ids=prompt, params=params, id="n")])
    assert tuple(tokens(one["n", 0])) == samples[0]


def test_cancelling_frees_blocks_at_once_and_harms_nobody(tiny_folder: Path) -> None:
    asked = requests(6)
    engine = make_engine(tiny_folder)
    for request in asked:
        engine.add(engine.prepare(request))
    found: dict[str, list[int]] = {request.id: [] for request in asked}
    for _ in range(3):
        for event in engine.step():
            found[event.request_id] += event.token_ids
    free = engine.stats().num_free_blocks
    last = engine.cancel("1")
    assert [(event.request_id, event.finish_reason) for event in last] == [("1", "cancelled")]
    assert engine.stats().num_free_blocks > free
    assert engine.cancel("nobody") == []
    while engine.has_work:
        for event in engine.step():
            assert event.request_id != "1"
            found[event.request_id] += event.token_ids
    expected = alone(tiny_folder, asked)
    assert all(found[request.id] == expected[index] for index, request in enumerate(asked) if request.id != "1")
    assert everything_is_free(engine)


def test_the_urgent_are_served_first(tiny_folder: Path) -> None:
    engine = make_engine(tiny_folder, max_running=1)
    order = []
    for name, priority in [("later", 5), ("now", 0), ("then", 1), ("last", 5)]:
        engine.add(engine.prepare(Request(prompt_ids=[1, 2, 3], params=GREEDY, id=name, priority=priority)))
    while engine.has_work:
        order += [event.request_id for event in engine.step() if event.finish_reason]
    assert order == ["now", "then", "later", "last"]


def test_an_urgent_request_takes_the_place_of_one_that_runs(tiny_folder: Path) -> None:
    engine = make_engine(tiny_folder, max_running=1)
    slow = Request(prompt_ids=[1, 2, 3], params=GREEDY, id="slow", priority=1)
    engine.add(engine.prepare(slow))
    found: list[int] = []
    for _ in range(5):
        found += [token_id for event in engine.step() for token_id in event.token_ids]
    engine.add(engine.prepare(Request(prompt_ids=[4, 5], params=GREEDY, id="urgent")))
    order = []
    while engine.has_work:
        for event in engine.step():
            found += event.token_ids if event.request_id == "slow" else []
            order += [event.request_id] if event.finish_reason else []
    assert order == ["urgent", "slow"]
    assert found == alone(tiny_folder, [slow])[0]


def test_a_long_prompt_does_not_hold_up_short_ones(tiny_folder: Path) -> None:
    engine = make_engine(tiny_folder, max_step_tokens=16)
    engine.add(engine.prepare(Request(prompt_ids=list(range(130)), params=GREEDY, id="long")))
    engine.step()
    engine.add(engine.prepare(Request(prompt_ids=[1, 2, 3], params=GREEDY, id="short")))
    firsts: list[str] = []
    while engine.has_work:
        firsts += [event.request_id for event in engine.step() if event.request_id not in firsts]
    assert firsts == ["short", "long"]


def test_one_token_of_each_running_sequence_a_step(tiny_folder: Path) -> None:
    """New tokens come in every step while another request's prompt is being read."""
    engine = make_engine(tiny_folder, max_step_tokens=16)
    engine.add(engine.prepare(Request(prompt_ids=[1, 2, 3], params=GREEDY, id="a")))
    engine.step()
    engine.add(engine.prepare(Request(prompt_ids=list(range(120)), params=GREEDY, id="b")))
    for _ in range(6):
        assert [event.request_id for event in engine.step()] == ["a"]


@pytest.mark.parametrize("max_step_tokens", [5, 512])
def test_logprobs_are_those_of_the_whole_text(tiny_folder: Path, max_step_tokens: int) -> None:
    engine = make_engine(tiny_folder, max_step_tokens=max_step_tokens)
    params = SamplingParams(max_tokens=6, ignore_eos=True, num_logprobs=3, num_prompt_logprobs=2, temperature=0.7)
    prompt = list(range(40, 60))
    run(engine, [Request(prompt_ids=prompt, params=GREEDY, id="warm")])
    events = run(engine, [Request(prompt_ids=prompt, params=params, id="a")])["a", 0]
    ids = prompt + tokens(events)
    logits = runner_of(engine).logits(np.array([ids]))[0].astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    expected -= logits.max(-1, keepdims=True)
    found = [one for event in events for one in event.logprobs]
    assert [one.token_id for one in found] == tokens(events)
    of_prompt = events[0].prompt_logprobs
    assert of_prompt is not None and len(of_prompt) == len(prompt) - 1
    for place, one in enumerate([*of_prompt, *found], 1):
        assert one.token_id == ids[place]
        assert one.logprob == pytest.approx(expected[place - 1, ids[place]], abs=1e-9)
        best = np.argsort(-expected[place - 1], kind="stable")[: len(one.top)]
        assert [token_id for token_id, _ in one.top] == best.tolist()
    assert {len(one.top) for one in found} == {3}
    assert {len(one.top) for one in of_prompt} == {2}


def test_penalties_and_biases_steer(tiny_folder: Path) -> None:
    engine = make_engine(tiny_folder)

    def said(**changes: object) -> list[int]:
        params = SamplingParams(max_tokens=40, ignore_eos=True, **changes)  # type: ignore[arg-type]
        return tokens(run(engine, [Request(prompt_ids=[7, 8, 9], params=params, id="a")])["a", 0])

    plain = said()
    assert max(plain.count(one) for one in plain) > 1
    assert len(set(said(frequency_penalty=2.0, presence_penalty=2.0))) > len(set(plain))
    # So strong that no token comes twice, nor one of the prompt.
    severe = said(repetition_penalty=1e6)
    assert len(set(severe)) == 40 and not {7, 8, 9} & set(severe)
    assert set(said(logit_bias=((5, 100.0),))) == {5}
    assert plain[0] not in said(logit_bias=((plain[0], -100.0),))


def test_stop_tokens_of_the_request_end_it(tiny_folder: Path) -> None:
    engine = make_engine(tiny_folder)
    plain = tokens(run(engine, [Request(prompt_ids=[7, 8], params=GREEDY, id="a")])["a", 0])
    stop = plain[4]
    params = replace(GREEDY, stop_ids=(stop,))
    events = run(engine, [Request(prompt_ids=[7, 8], params=params, id="b")])["b", 0]
    assert tokens(events) == plain[: plain.index(stop) + 1]
    assert events[-1].finish_reason == "stop"


def test_the_model_s_own_end_can_be_ignored(tiny_folder: Path) -> None:
    engine = make_engine(tiny_folder)
    end = min(Model.load(tiny_folder).tokenizer.stop_ids)
    params = SamplingParams(max_tokens=5, logit_bias=((end, 100.0),))
    ended = run(engine, [Request(prompt_ids=[7], params=params, id="a")])["a", 0]
    assert (tokens(ended), ended[-1].finish_reason) == ([end], "stop")
    going = run(engine, [Request(prompt_ids=[7], params=replace(params, ignore_eos=True), id="b")])["b", 0]
    assert (tokens(going), going[-1].finish_reason) == ([end] * 5, "length")


def test_what_cannot_be_is_said_before_anything_runs(tiny_folder: Path) -> None:
    engine = make_engine(tiny_folder, max_model_len=100)
    asked = Request(prompt_ids=[1], params=GREEDY)
    for request, text in [
        (replace(asked, prompt_ids=[]), "the prompt is empty"),
        (replace(asked, prompt_ids=list(range(100))), "the prompt has 100 tokens and the model's context is 100"),
        (replace(asked, prompt_ids=[274]), "prompt has token ids from 274 to 274: expected 0 to 273"),
        (replace(asked, params=replace(GREEDY, stop_ids=(999,))), "stop_token_ids has token ids from 999 to 999"),
        (replace(asked, params=replace(GREEDY, logit_bias=((300, 1.0),))), "logit_bias has token ids from 300 to 300"),
    ]:
        with pytest.raises(UserError, match=text):
            engine.prepare(request)
    with pytest.raises(UserError, match="n is 0: expected 1 or more"):
        replace(asked, num_samples=0)
    with pytest.raises(UserError, match="max_running is 0: expected 1 or more; correct that value"):
        EngineSettings(max_running=0)
    with pytest.raises(UserError, match="the cache has 10 bytes and one block of 16 tokens takes"):
        make_engine(tiny_folder, cache_bytes=10)
    assert not engine.has_work


def test_the_cache_limits_one_sequence(tiny_folder: Path) -> None:
    engine = make_engine(tiny_folder, num_blocks=3)
    assert engine.max_model_len == 3 * BLOCK_TOKENS
    params = SamplingParams(ignore_eos=True)
    events = run(engine, [Request(prompt_ids=[1, 2, 3], params=params, id="a")])["a", 0]
    assert len(tokens(events)) == 3 * BLOCK_TOKENS - 3
    assert events[-1].finish_reason == "length"


def test_one_request_s_failure_is_its_own(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(5)
    engine = make_engine(tiny_folder)
    expected = alone(tiny_folder, asked)
    forward = engine._cache.forward

    def fails_for_one(step):  # type: ignore[no-untyped-def]
        if asked[2].prompt_ids[0] in step.token_ids and len(asked[2].prompt_ids) in np.bincount(step.sequences):
            raise RuntimeError("out of\nluck")
        return forward(step)

    monkeypatch.setattr(engine._cache, "forward", fails_for_one)
    found = run(engine, asked)
    assert found["2", 0][-1].finish_reason == "error"
    assert found["2", 0][-1].error == "RuntimeError: out of luck"
    assert [tokens(found[one.id, 0]) for one in asked if one.id != "2"] == [*expected[:2], *expected[3:]]
    assert everything_is_free(engine)


def test_samples_that_have_not_begun_end_too(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever waits for them would wait for ever."""
    asked = Request(prompt_ids=list(range(40)), params=GREEDY, id="n", num_samples=3)
    engine = make_engine(tiny_folder, max_step_tokens=32)
    for num_steps in range(2):  # before its prompt is touched, and amid it
        engine.add(engine.prepare(asked))
        for _ in range(num_steps):
            assert engine.step() == []
        assert [(event.index, event.finish_reason) for event in engine.cancel("n")] == [
            (index, "cancelled") for index in range(3)
        ]
    monkeypatch.setattr(engine._cache, "forward", lambda step: 1 // 0)
    found = run(engine, [asked])
    assert {key: events[-1].finish_reason for key, events in found.items()} == {
        ("n", index): "error" for index in range(3)
    }
    assert everything_is_free(engine)


def test_damaged_weights_are_said(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tiny_folder)
    monkeypatch.setattr(engine._cache, "forward", lambda step: np.full((len(step.wanted), 274), np.nan, np.float32))
    events = run(engine, [Request(prompt_ids=[1], params=GREEDY, id="a")])["a", 0]
    assert events[-1].finish_reason == "error"
    assert str(events[-1].error).startswith("the model's logits are not finite: its weights are damaged")


def test_random_workloads_leave_nothing_behind(tiny_folder: Path) -> None:
    """Requests that come and go at random times, of all kinds, in a cache that is too small for them."""
    draw = np.random.default_rng(8)
    engine = make_engine(tiny_folder, num_blocks=16, max_running=6, max_step_tokens=24)
    kinds = [GREEDY, SAMPLED, replace(SAMPLED, num_prompt_logprobs=0), replace(GREEDY, frequency_penalty=0.5)]
    asked = [
        replace(
            request,
            params=replace(kinds[index % 4], seed=index, max_tokens=int(draw.integers(1, 40))),
            num_samples=int(draw.integers(1, 4)),
            priority=int(draw.integers(0, 3)),
        )
        for index, request in enumerate(requests(40))
    ]
    cancelled = {str(index) for index in draw.choice(40, 8, replace=False)}
    waiting, found, ended = list(asked), {}, set()
    while waiting or engine.has_work:
        for _ in range(int(draw.integers(0, 3))):
            if waiting:
                engine.add(engine.prepare(waiting.pop(0)))
        for event in engine.step():
            key = event.request_id, event.index
            assert key not in ended, "an event behind the last one"
            found.setdefault(key, []).append(event)
            if event.finish_reason:
                ended.add(key)
        if cancelled and draw.random() < 0.1:
            engine.cancel(cancelled.pop())
    everyone = make_engine(tiny_folder, max_step_tokens=512, has_prefix_cache=False)
    compared = 0
    for request in asked:
        for key, events in run(everyone, [request]).items():
            if key in ended:
                assert tokens(found[key]) == tokens(events), key
                compared += 1
    assert compared > 50
    assert everything_is_free(engine)
    assert engine.stats().num_preempted > 0
