"""The bundled model behind the server: answers under load are those that it gives alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from server_setup import LiveServer

import openbook
from openbook.engine.engine import EngineSettings
from openbook.engine.start import LoadOptions, start_engine
from openbook.server.from_engine import sampling_defaults, served_model


@pytest.fixture(scope="module")
def nano() -> Iterator[LiveServer]:
    # So few blocks that sequences are sent back to waiting.
    started = start_engine("nano", LoadOptions(profile="exact"), EngineSettings(cache_bytes=6 << 20, max_running=16))
    server = LiveServer(served_model(started))
    yield server
    server.stop()


@pytest.fixture
def sdk(nano: LiveServer) -> Iterator[openai.OpenAI]:
    with nano.openai(timeout=60) as client:
        yield client


def question(number: int) -> str:
    return f"What is the greatest common divisor of {12 + 7 * number} and {36 + number}?"


def test_what_the_server_says_of_it(sdk: openai.OpenAI) -> None:
    [model] = sdk.models.list()
    facts = model.to_dict()["openbook"]
    assert isinstance(facts, dict)
    assert facts["max_model_len"] == 512 and "gcd" in facts["tasks"] and facts["profile"] == "exact"


def test_greedy_as_its_authors_recommend() -> None:
    model = openbook.load("nano")
    assert sampling_defaults(model.folder).temperature == 0


def test_answers_under_load_are_those_alone(sdk: openai.OpenAI) -> None:
    model = openbook.load("nano")

    def ask(number: int) -> tuple[str, str]:
        options: dict[str, Any] = {"temperature": number % 2, "seed": number, "reasoning_effort": "medium"}
        messages: Any = [{"role": "user", "content": question(number)}]
        if number % 3:
            message: Any = sdk.chat.completions.create(model="nano", messages=messages, **options).choices[0].message
            return message.reasoning or "", message.content or ""
        chunks = list(sdk.chat.completions.create(model="nano", messages=messages, stream=True, **options))
        deltas: list[Any] = [chunk.choices[0].delta for chunk in chunks]
        thoughts = "".join(getattr(delta, "reasoning", None) or "" for delta in deltas)
        return thoughts, "".join(delta.content or "" for delta in deltas)

    def alone(number: int) -> tuple[str, str]:
        answer = model.chat(question(number), temperature=number % 2, seed=number)
        return answer.reasoning, answer.text

    numbers = range(24)
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, numbers))
    assert found == [alone(number) for number in numbers]


def test_a_schema_is_obeyed(sdk: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 9}, "is_sure": {"type": "boolean"}},
        "required": ["answer", "is_sure"],
        "additionalProperties": False,
    }
    for stream in (False, True):
        answer: Any = sdk.chat.completions.create(
            model="nano",
            messages=[{"role": "user", "content": question(1)}],
            response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
            reasoning_effort="low",
            stream=stream,
        )
        parts = (
            [chunk.choices[0].delta.content or "" for chunk in answer]
            if stream
            else [answer.choices[0].message.content]
        )
        value = json.loads("".join(parts))
        assert set(value) == {"answer", "is_sure"} and isinstance(value["is_sure"], bool)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}},
            "response_format",
        ),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"stop_token_ids": [999999]}, "stop_token_ids"),
    ],
)
def test_what_the_engine_refuses_is_named(sdk: openai.OpenAI, extra: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(model="nano", messages=[{"role": "user", "content": "x"}], extra_body=extra)
    assert caught.value.param == param


def test_one_of_several_texts(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": "x"}], extra_body={"guided_choice": ["left", "right"]}
    )
    assert answer.choices[0].message.content in ("left", "right")


def test_a_thinking_budget(sdk: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": question(3)}]
    for budget in (0, 3):
        answer = sdk.chat.completions.create(model="nano", messages=messages, extra_body={"thinking_budget": budget})
        details = answer.usage and answer.usage.completion_tokens_details
        assert details is not None and (details.reasoning_tokens or 0) <= budget + 2  # its marks


def test_a_text_is_continued_as_it_stands(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(
        model="nano", prompt="12+3=15\n1", max_tokens=8, logprobs=0, echo=True, extra_body={"ignore_eos": True}
    )
    [choice] = answer.choices
    assert choice.text.startswith("12+3=15\n1") and choice.logprobs is not None
    control = ("<|end|>", "<think>", "</think>", "<|endoftext|>")
    tokens = [token for token in choice.logprobs.tokens or [] if token not in control and not token.startswith("<|")]
    assert "".join(tokens) == choice.text


def test_a_receipt_is_checked(sdk: openai.OpenAI) -> None:
    answer: Any = sdk.chat.completions.create(
        model="nano",
        messages=[{"role": "user", "content": question(5)}],
        extra_body={"receipt": True},
        n=2,
        temperature=1,
        seed=4,
    )
    receipts = [choice.receipt for choice in answer.choices]
    assert [receipt["sample"] for receipt in receipts] == [0, 1]
    assert len({receipt["digest"] for receipt in receipts}) == 2
    assert all(receipt["profile"] == "exact" for receipt in receipts)
