"""/v1/chat/completions, mostly through the official client."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest
from server_setup import CONTEXT, LiveServer, StubEngine

from openbook.server.schema_chat import ChatCompletion

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def ask(sdk: openai.OpenAI, **options: Any) -> Any:
    return sdk.chat.completions.create(**{"model": "tiny", "messages": HELLO, **options})


def refused(sdk: openai.OpenAI, **options: Any) -> tuple[str, str | None]:
    """The message and the parameter of an answer with status 400."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(sdk, **options)
    body = caught.value.body
    assert isinstance(body, dict) and set(body) == {"message", "type", "param", "code"}
    return body["message"], body["param"]


def test_an_answer_has_its_thinking_apart(sdk: openai.OpenAI) -> None:
    answer = ask(sdk)
    [choice] = answer.choices
    assert choice.message.content == "yes"
    assert choice.message.reasoning_content == choice.message.reasoning == "hm\n"
    assert (choice.finish_reason, answer.model, answer.object) == ("stop", "tiny", "chat.completion")
    assert answer.system_fingerprint.endswith("-exact")


def test_usage_counts_thinking_and_cached_tokens(sdk: openai.OpenAI, stub: StubEngine) -> None:
    usage = ask(sdk).usage
    assert usage.prompt_tokens == len(stub.requests[0].prompt_ids)
    assert usage.prompt_tokens_details.cached_tokens == 3
    assert usage.completion_tokens == 11  # <think> \n h m \n </think> \n y e s <|end|>
    assert usage.completion_tokens_details.reasoning_tokens == 7
    assert usage.total_tokens == usage.prompt_tokens + 11


def test_an_answer_is_what_the_description_says(http: httpx2.Client) -> None:
    body = {"model": "tiny", "messages": HELLO, "logprobs": True, "top_logprobs": 1, "prompt_logprobs": 1}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert ChatCompletion.model_validate(answer).model_dump(mode="json", exclude_unset=True) == answer


def test_stream_adds_up_to_the_answer(sdk: openai.OpenAI) -> None:
    chunks = list(ask(sdk, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    deltas = [chunk.choices[0].delta for chunk in parts]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "yes"
    for name in ("reasoning", "reasoning_content"):
        assert "".join(getattr(delta, name, None) or "" for delta in deltas) == "hm\n"
    assert [chunk.choices[0].finish_reason for chunk in parts if chunk.choices[0].finish_reason] == ["stop"]
    assert last.choices == [] and last.usage == ask(sdk).usage
    assert all(chunk.usage is None for chunk in parts)
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_without_usage_and_its_end(http: httpx2.Client) -> None:
    answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events[:-2])


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers(sdk: openai.OpenAI, stub: StubEngine, stream: bool) -> None:
    answer = ask(sdk, n=3, stream=stream)
    chunks = list(answer) if stream else [answer]
    reasons = {choice.index: choice.finish_reason for chunk in chunks for choice in chunk.choices}
    assert reasons == {0: "stop", 1: "stop", 2: "stop"}
    assert len(stub.requests) == 1 and stub.requests[0].num_samples == 3


def test_parameters_reach_the_engine(sdk: openai.OpenAI, stub: StubEngine) -> None:
    more = {
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "ignore_eos": True,
        "stop_token_ids": [5],
        "priority": -2,
        "thinking_budget": 9,
    }
    ask(
        sdk,
        temperature=0.5,
        top_p=0.25,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"7": 3},
        seed=11,
        stop=["a", "b"],
        max_completion_tokens=40,
        extra_body=more,
    )
    [request] = stub.requests
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.25, 4, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.5)
    assert (params.logit_bias, params.seed, params.stop, params.stop_ids) == (((7, 3.0),), 11, ("a", "b"), (5,))
    assert (params.ignore_eos, params.max_tokens, params.thinking_budget, request.priority) == (True, 40, 9, -2)


def test_a_temperature_that_divides_too_much_is_none(sdk: openai.OpenAI, stub: StubEngine) -> None:
    for temperature in (5e-324, 1e-7, 1e-5):
        ask(sdk, temperature=temperature)
    assert [request.params.temperature for request in stub.requests] == [0, 0, 1e-5]


def test_defaults_are_the_models(sdk: openai.OpenAI, stub: StubEngine) -> None:
    ask(sdk)
    ask(sdk)
    first, second = (request.params for request in stub.requests)
    assert (first.temperature, first.max_tokens, first.num_logprobs) == (1.0, None, None)
    assert first.seed != second.seed  # drawn for each


@pytest.mark.parametrize(
    ("given", "meant"),
    [("none", "low"), ("minimal", "low"), ("low", "low"), (None, "medium"), ("high", "high"), ("max", "high")],
)
def test_reasoning_effort(sdk: openai.OpenAI, stub: StubEngine, given: Any, meant: str) -> None:
    ask(sdk, reasoning_effort=given)
    assert list(stub.requests[0].prompt_ids) == stub.chat.encode(HELLO, meant)[0]


def test_stop_strings_and_token_limits(sdk: openai.OpenAI, stub: StubEngine) -> None:
    stub.reply = lambda request: "one two three"
    answer = ask(sdk, stop=" three").choices[0]
    assert (answer.message.content, answer.finish_reason) == ("one two", "stop")
    answer = ask(sdk, max_tokens=3).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("one", "length")


def test_logprobs_of_answer_and_thinking_are_apart(sdk: openai.OpenAI) -> None:
    logprobs = ask(sdk, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert [entry.token for entry in logprobs.content] == ["\n", "y", "e", "s"]
    assert [entry["token"] for entry in logprobs.reasoning] == ["\n", "h", "m", "\n"]
    first = logprobs.content[1]
    assert (first.logprob, first.bytes) == (-0.5, [ord("y")])
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("y", -0.5), ("z", -1.5)]


def test_logprobs_in_a_stream_add_up(sdk: openai.OpenAI) -> None:
    found = [chunk.choices[0].logprobs for chunk in ask(sdk, stream=True, logprobs=True)]
    content = [entry.token for logprobs in found if logprobs for entry in logprobs.content]
    assert content == ["\n", "y", "e", "s"]


def test_prompt_logprobs(http: httpx2.Client, stub: StubEngine) -> None:
    body = {"model": "tiny", "messages": HELLO, "prompt_logprobs": 0}
    rows = http.post("/v1/chat/completions", json=body).json()["choices"][0]["prompt_logprobs"]
    ids = stub.requests[0].prompt_ids
    assert rows[0] is None and len(rows) == len(ids)
    assert rows[1] == {str(ids[1]): {"logprob": -1.0, "rank": None, "decoded_token": "h"}}


def test_earlier_thinking_may_come_back_under_both_names(sdk: openai.OpenAI, stub: StubEngine) -> None:
    for name in ("reasoning", "reasoning_content"):
        said = {"role": "assistant", "content": "yes", name: "hm", "refusal": None, "annotations": None}
        ask(sdk, messages=[*HELLO, said, *HELLO])
    plain = stub.chat.encode([*HELLO, {"role": "assistant", "content": "yes", "reasoning_content": "hm"}, *HELLO])[0]
    assert [list(request.prompt_ids) for request in stub.requests] == [plain, plain]


def test_an_answer_can_be_sent_back_as_it_came(sdk: openai.OpenAI) -> None:
    message = ask(sdk).choices[0].message
    assert ask(sdk, messages=[*HELLO, message, *HELLO]).choices[0].message.content == "yes"


def test_notes_for_others_are_accepted(sdk: openai.OpenAI) -> None:
    notes = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "y",
        "modalities": ["text"],
        "verbosity": "medium",
    }
    assert ask(sdk, **notes).choices[0].message.content == "yes"


@pytest.mark.parametrize(
    ("options", "message", "param"),
    [
        (
            {"extra_body": {"temprature": 1}},
            "unknown parameter temprature: did you mean temperature? /docs lists all",
            "temprature",
        ),
        ({"extra_body": {"xyzzy": 1}}, "unknown parameter xyzzy: leave it out; /docs lists all", "xyzzy"),
        (
            {"extra_body": {"functions": []}},
            "the parameter functions is not supported: use tools",
            "functions",
        ),
        ({"temperature": -1}, "temperature is -1: it should be greater than or equal to 0; correct that value", None),
        ({"temperature": "hot"}, "temperature is 'hot': it should be a valid number; correct that value", None),
        (
            {"extra_body": {"repetition_penalty": 5e-324}},
            "repetition_penalty is 5e-324: it should be greater than or equal to 0.01; correct that value",
            None,
        ),
        ({"n": 0}, "n is 0: it should be greater than or equal to 1; correct that value", None),
        ({"n": 2.5}, "n is 2.5: it should be a valid integer; correct that value", None),
        ({"stream": "yes"}, "stream is 'yes': it should be a valid boolean; correct that value", None),
        (
            {"messages": [{"role": "usr", "content": "x"}]},
            "messages[0].role is 'usr': expected one of 'system', 'developer', 'user', 'assistant', 'tool'; correct "
            "that value",
            "messages[0].role",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "colour": "red"}]},
            "unknown parameter messages[0].colour: leave it out; /docs lists all",
            "messages[0].colour",
        ),
        ({"messages": [{"role": "user"}]}, "the parameter messages[0].content is missing: give it", None),
        ({"messages": [{"content": "x"}]}, "the parameter messages[0].role is missing: give it", None),
        (
            {"messages": []},
            "messages is []: list should have at least 1 item after validation, not 0; correct that value",
            None,
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b?k=1"}}]}
                ]
            },
            "an image is given as http://a/b, and nothing is fetched for a request: send it as a data URL "
            "(data:image/png;base64,...)",
            "messages[0].content[0].image_url.url",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/x"}}]}]},
            "an image is given as file:///etc/x, and nothing is fetched for a request: send it as a data URL "
            "(data:image/png;base64,...)",
            "messages[0].content[0].image_url.url",
        ),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            "this model reads no images: send text only",
            "messages",
        ),
        ({"top_logprobs": 2}, "top_logprobs is given without logprobs: set logprobs to true", "top_logprobs"),
        (
            {"max_tokens": 1, "max_completion_tokens": 2},
            "max_tokens and max_completion_tokens differ: give one of them",
            "max_completion_tokens",
        ),
        ({"store": True}, "store is True: it should be False; correct that value", "store"),
        (
            {"logit_bias": {"a": 1}},
            "logit_bias.a is 'a': string should match pattern '^[0-9]{1,9}$'; correct that value",
            None,
        ),
        (
            {"stream_options": {"include_usage": True}},
            "stream_options is given without stream: set stream to true",
            "stream_options",
        ),
        (
            {"stream": True, "extra_body": {"prompt_logprobs": 1}},
            "prompt_logprobs does not go with stream: leave one out",
            "prompt_logprobs",
        ),
        (
            {"messages": [{"role": "user", "content": "x" * 700}]},
            f"the prompt has 703 tokens and the model's context is {CONTEXT} (prompt and answer): shorten the prompt",
            "messages",
        ),
        ({"stop": [""]}, "stop is ['']: expected strings that are not empty; correct that value", "stop"),
    ],
)
def test_what_is_wrong_is_named(sdk: openai.OpenAI, options: dict[str, Any], message: str, param: str | None) -> None:
    found, where = refused(sdk, **options)
    assert found == message
    assert where == (param or found.split(":")[0].removeprefix("the parameter ").split(" is ")[0])


def test_a_missing_model_and_messages(http: httpx2.Client) -> None:
    error = http.post("/v1/chat/completions", json={"messages": HELLO}).json()["error"]
    assert (error["message"], error["param"]) == ("the parameter model is missing: give it", "model")
    error = http.post("/v1/chat/completions", json=[1]).json()["error"]
    assert error["message"].startswith("the body is no JSON object")


def test_an_unknown_model_is_answered_with_the_nearest(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ask(sdk, model="tinny")
    assert caught.value.body == {
        "message": "the model 'tinny' does not exist: did you mean 'tiny'? /v1/models lists all",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


def test_a_base_model_holds_no_conversation(start: Callable[..., LiveServer], stub: StubEngine) -> None:
    server = start(stub, is_base=True)
    with server.openai() as sdk:
        assert refused(sdk) == (
            "the model tiny has no chat template: it continues texts; use /v1/completions",
            "model",
        )


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("options", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            "json_schema",
            json.dumps(SCHEMA),
        ),
        ({"extra_body": {"guided_json": SCHEMA}}, "json_schema", json.dumps(SCHEMA)),
        ({"extra_body": {"guided_regex": "[ab]+"}}, "regex", "[ab]+"),
        ({"extra_body": {"guided_choice": ["yes", "nö"]}}, "choice", '["yes", "nö"]'),
        ({"extra_body": {"guided_grammar": "start: /a/"}}, "lark", "start: /a/"),
        ({"extra_body": {"structured_outputs": {"json": SCHEMA}}}, "json_schema", json.dumps(SCHEMA)),
        ({"extra_body": {"structured_outputs": {"json_object": True}}}, "json_schema", '{"type":"object"}'),
        ({"extra_body": {"structured_outputs": {"regex": "a"}}}, "regex", "a"),
        ({"extra_body": {"structured_outputs": {"choice": ["a"]}}}, "choice", '["a"]'),
        ({"extra_body": {"structured_outputs": {"grammar": "start: /a/"}}}, "lark", "start: /a/"),
    ],
)
def test_what_the_answer_must_obey(
    sdk: openai.OpenAI, stub: StubEngine, options: dict[str, Any], kind: str, source: str
) -> None:
    ask(sdk, **options)
    constraint = stub.requests[0].params.constraint
    assert constraint is not None and (constraint.kind, constraint.source) == (kind, source)


def test_text_is_free(sdk: openai.OpenAI, stub: StubEngine) -> None:
    ask(sdk, response_format={"type": "text"})
    assert stub.requests[0].params.constraint is None


@pytest.mark.parametrize(
    ("extra", "message", "param"),
    [
        (
            {"guided_regex": "a", "guided_choice": ["a"]},
            "guided_regex and guided_choice give more than one form for the answer: give one",
            "guided_choice",
        ),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs give more than one form for the answer: give one",
            "structured_outputs",
        ),
        (
            {"structured_outputs": {}},
            "structured_outputs is empty: expected one of json, json_object, regex, choice, grammar",
            "structured_outputs",
        ),
        (
            {"response_format": {"type": "xml"}},
            "response_format.type is 'xml': expected one of 'text', 'json_object', 'json_schema'; correct that value",
            "response_format.type",
        ),
    ],
)
def test_forms_that_make_no_sense(sdk: openai.OpenAI, extra: dict[str, Any], message: str, param: str) -> None:
    assert refused(sdk, extra_body=extra) == (message, param)
