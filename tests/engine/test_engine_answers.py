"""The engine with what steers an answer: budgets of thinking, schemas, calls, adapters' absence, guesses ahead."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from engine_setup import make_engine, run, tokens

import openbook
from openbook.core.errors import UserError
from openbook.engine.drafting import NgramDrafter
from openbook.engine.engine import Engine
from openbook.engine.events import SequenceEvent
from openbook.engine.model import Model
from openbook.engine.request import Constraint, Request, SamplingParams

NANO = Path(openbook.__file__).parent / "releases" / "nano"
QUESTION = "Find the Greatest Common Divisor (GCD) of these numbers: 84, 36. Give only the GCD as your final answer."
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}, "why": {"type": "string", "maxLength": 12}},
    "required": ["answer", "why"],
    "additionalProperties": False,
}
CONSTRAINTS = {
    "json_schema": Constraint(kind="json_schema", source=json.dumps(SCHEMA)),
    "regex": Constraint(kind="regex", source="[0-9]{3}-[a-z]{2}"),
    "choice": Constraint(kind="choice", source='["twelve", "12!", "a dozen"]'),
    "lark": Constraint(kind="lark", source='start: "<" /[a-f]{1,5}/ ">"'),
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(NANO, num_blocks=256)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return Model.load(NANO).prompt_ids(QUESTION)


def texts(events: list[SequenceEvent]) -> tuple[str, str]:
    """Thinking and answer."""
    pieces = [piece for event in events for piece in event.pieces]
    return tuple("".join(one.text for one in pieces if one.kind == kind) for kind in ("reasoning", "answer"))  # type: ignore[return-value]


def obeys(kind: str, answer: str) -> bool:
    if kind == "json_schema":
        values = json.loads(answer)
        return set(values) == {"answer", "why"} and type(values["answer"]) is int and len(values["why"]) <= 12
    if kind == "choice":
        return answer in ("twelve", "12!", "a dozen")
    return re.fullmatch("[0-9]{3}-[a-z]{2}" if kind == "regex" else "<[a-f]{1,5}>", answer) is not None


@pytest.mark.parametrize("kind", CONSTRAINTS)
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_the_answer_obeys_and_the_thinking_is_free(
    engine: Engine, prompt: list[int], kind: str, temperature: float
) -> None:
    params = SamplingParams(temperature=temperature, constraint=CONSTRAINTS[kind], max_tokens=400)
    asked = [Request(prompt_ids=prompt, params=replace(params, seed=seed), id=str(seed)) for seed in range(6)]
    free = texts(run(engine, [Request(prompt_ids=prompt, params=SamplingParams(), id="free")])["free", 0])
    complete = 0
    for events in run(engine, asked).values():
        thinking, answer = texts(events)
        if events[-1].finish_reason == "stop":  # at temperature 2 the thinking may find no end
            assert obeys(kind, answer), answer
            complete += 1
        if not temperature:
            assert thinking == free[0]
    assert complete >= (6 if not temperature else 1)


def test_thinking_ends_with_its_budget(engine: Engine, prompt: list[int]) -> None:
    free = run(engine, [Request(prompt_ids=prompt, params=SamplingParams(num_logprobs=1), id="free")])["free", 0]
    whole = texts(free)[0]
    close = Model.load(NANO).tokenizer.special_id("</think>")
    num_thinking = tokens(free).index(close) - 1  # behind the opening mark
    for budget in (0, 1, 7, num_thinking + 5):
        params = SamplingParams(thinking_budget=budget, num_logprobs=1)
        events = run(engine, [Request(prompt_ids=prompt, params=params, id="a")])["a", 0]
        ids, (thinking, answer) = tokens(events), texts(events)
        assert answer and events[-1].finish_reason == "stop"
        logprobs = [one for event in events for one in event.logprobs]
        assert [one.token_id for one in logprobs] == ids
        if budget >= num_thinking:
            assert ids == tokens(free)
        else:
            assert whole.startswith(thinking) and len(thinking) < len(whole)


def test_guesses_change_no_constrained_answer(prompt: list[int]) -> None:
    plain, guessing = make_engine(NANO, num_blocks=256), make_engine(NANO, num_blocks=256)
    guessing._drafter = NgramDrafter(5)
    asked = [
        Request(
            prompt_ids=prompt,
            params=SamplingParams(temperature=0.8, seed=3, constraint=constraint, thinking_budget=20),
            id=kind,
            num_samples=2,
        )
        for kind, constraint in CONSTRAINTS.items()
    ]
    expected, found = run(plain, asked), run(guessing, asked)
    assert {key: tokens(events) for key, events in found.items()} == {
        key: tokens(events) for key, events in expected.items()
    }
    assert guessing.stats().num_draft_tokens > 0


@pytest.mark.parametrize(
    ("constraint", "text"),
    [
        (Constraint(kind="json_schema", source="{"), "the JSON schema"),
        (Constraint(kind="regex", source="("), "the regular expression"),
        (Constraint(kind="choice", source="[]"), "the list of choices"),
        (Constraint(kind="lark", source="start: x"), "the Lark grammar"),
    ],
)
def test_a_wrong_constraint_is_refused_before_anything_runs(
    engine: Engine, prompt: list[int], constraint: Constraint, text: str
) -> None:
    with pytest.raises(UserError, match=text):
        engine.prepare(Request(prompt_ids=prompt, params=SamplingParams(constraint=constraint)))
