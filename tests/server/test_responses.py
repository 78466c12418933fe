"""/v1/responses through the official client: what a response holds, what the model is given, and its events."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from responses_setup import ADD, SUB, ask, refused
from server_setup import CONTEXT, LiveServer, StubEngine
from test_tools import TEMPLATE, call

from openbook.server.schema_responses import ResponseObject
from openbook.tokenizer.chat import Chat
from openbook.tokenizer.tokenizer import Tokenizer

EVENT = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def server(start: Callable[..., LiveServer], stub: StubEngine, tmp_path: Path) -> LiveServer:
    return start(stub, response_store=tmp_path / "store")


@pytest.fixture
def tools_stub(tiny_tokenizer: Tokenizer) -> StubEngine:
    """A model that calls two functions."""
    return StubEngine(
        Chat(tiny_tokenizer, TEMPLATE), reply=lambda request: "Let me see. " + call("add", 1) + call("sub", 2)
    )


@pytest.fixture
def tools_sdk(start: Callable[..., LiveServer], tools_stub: StubEngine, tmp_path: Path) -> Iterator[openai.OpenAI]:
    with start(tools_stub, response_store=tmp_path / "store").openai() as client:
        yield client


def asked(stub: StubEngine) -> str:
    """The text of the latest prompt."""
    return stub.chat.tokenizer.decode(stub.requests[-1].prompt_ids)


def shape(output: list[Any]) -> list[tuple[str, str | None, str]]:
    """Of each item: type, status and text."""
    return [
        (item.type, item.status, item.arguments if item.type == "function_call" else item.content[0].text)
        for item in output
    ]


# The answer


def test_an_answer_has_its_thinking_in_an_item_of_its_own(sdk: openai.OpenAI) -> None:
    response = ask(sdk)
    assert shape(response.output) == [("reasoning", "completed", "hm\n"), ("message", "completed", "yes")]
    assert response.output_text == "yes"
    assert (response.status, response.object, response.model) == ("completed", "response", "tiny")
    assert response.error is None and response.incomplete_details is None
    assert response.id.startswith("resp_") and response.output[0].id.startswith("rs_")
    assert response.created_at <= response.completed_at <= time.time()


def test_usage_counts_thinking_and_cached_tokens(sdk: openai.OpenAI, stub: StubEngine) -> None:
    usage = ask(sdk).usage
    count = len(stub.requests[0].prompt_ids)
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (count, 11, count + 11)
    assert usage.input_tokens_details.cached_tokens == 3
    assert usage.input_tokens_details.cache_write_tokens == count - 3
    assert usage.output_tokens_details.reasoning_tokens == 7


def test_a_response_is_what_both_descriptions_say(http: httpx2.Client) -> None:
    body = {
        "model": "tiny",
        "input": "hello",
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "metadata": {"a": "b"},
        "instructions": "be brief",
        "tools": [ADD],
        "tool_choice": "none",
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
    }
    answer = http.post("/v1/responses", json=body).json()
    ours = ResponseObject.model_validate(answer).model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert ours == answer
    theirs = Response.model_validate(answer).to_dict(mode="json")
    assert theirs == {**answer, "created_at": pytest.approx(answer["created_at"]), "tools": theirs["tools"]}


def test_what_was_asked_is_repeated(sdk: openai.OpenAI) -> None:
    response = ask(sdk)
    assert (response.temperature, response.top_p, response.top_logprobs) == (1.0, 1.0, 0)
    assert (response.tools, response.tool_choice, response.parallel_tool_calls) == ([], "auto", True)
    assert (response.max_output_tokens, response.instructions, response.metadata) == (None, None, {})
    assert response.text.format.type == "text" and response.reasoning.effort == "medium"
    assert (response.truncation, response.background, response.store) == ("disabled", False, True)
    response = ask(
        sdk,
        temperature=0.5,
        top_p=0.9,
        max_output_tokens=50,
        instructions="x",
        metadata={"k": "v"},
        reasoning={"effort": "high", "summary": "auto"},
        text={"format": {"type": "json_object"}, "verbosity": "medium"},
        store=False,
        user="me",
        safety_identifier="s",
        prompt_cache_key="p",
        service_tier="auto",
        truncation="disabled",
        background=False,
    )
    assert (response.temperature, response.top_p, response.max_output_tokens) == (0.5, 0.9, 50)
    assert (response.instructions, response.metadata, response.store) == ("x", {"k": "v"}, False)
    assert response.reasoning.effort == "high" and response.text.format.type == "json_object"
    assert (response.user, response.safety_identifier, response.prompt_cache_key) == ("me", "s", "p")


def test_sampling_reaches_the_engine(sdk: openai.OpenAI, stub: StubEngine) -> None:
    ask(
        sdk,
        temperature=0.5,
        top_p=0.9,
        max_output_tokens=50,
        extra_body={"seed": 7, "top_k": 5, "min_p": 0.1, "stop": ["x"], "thinking_budget": 9, "priority": 2},
    )
    [request] = stub.requests
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 5, 0.1)
    assert (params.seed, params.stop, params.max_tokens, params.thinking_budget) == (7, ("x",), 50, 9)
    assert request.priority == 2 and request.num_samples == 1


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"text": {"format": {"type": "json_object"}}}, "json_schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "integer"}}}}, "json_schema"),
        ({"extra_body": {"guided_regex": "a+"}}, "regex"),
        ({"extra_body": {"structured_outputs": {"choice": ["a", "b"]}}}, "choice"),
        ({"text": {"format": {"type": "text"}}}, None),
    ],
)
def test_the_form_of_the_answer(sdk: openai.OpenAI, stub: StubEngine, given: Any, kind: str | None) -> None:
    ask(sdk, **given)
    constraint = stub.requests[0].params.constraint
    assert (constraint.kind if constraint else None) == kind
    if "text" in given and kind:
        expected = given["text"]["format"].get("schema", {"type": "object"})
        assert constraint is not None and json.loads(constraint.source) == expected


def test_parsed_output(sdk: openai.OpenAI, stub: StubEngine) -> None:
    """`responses.parse` makes the schema from a class, and reads the answer."""

    class Sum(BaseModel):
        total: int

    stub.reply = lambda request: '<think>\nhm\n</think>\n{"total": 3}'
    response = sdk.responses.parse(model="tiny", input="1 + 2?", text_format=Sum)
    assert response.output_parsed == Sum(total=3)
    constraint = stub.requests[0].params.constraint
    assert constraint is not None and json.loads(constraint.source)["required"] == ["total"]


def test_cut_off_answers_are_incomplete(sdk: openai.OpenAI) -> None:
    response = ask(sdk, max_output_tokens=3)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert shape(response.output) == [("reasoning", "incomplete", "h")]
    assert response.completed_at is None and response.output_text == ""
    response = ask(sdk, max_output_tokens=8)
    assert shape(response.output) == [("reasoning", "completed", "hm\n"), ("message", "incomplete", "y")]


def test_logprobs(sdk: openai.OpenAI) -> None:
    response = ask(sdk, include=["message.output_text.logprobs"], top_logprobs=2)
    entries = response.output[1].content[0].logprobs
    assert [entry.token for entry in entries] == ["\n", "y", "e", "s"]  # the first is not shown
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 2 for entry in entries)
    assert response.top_logprobs == 2
    response = ask(sdk, include=["message.output_text.logprobs"])
    assert [entry.top_logprobs for entry in response.output[1].content[0].logprobs] == [[]] * 4
    assert ask(sdk, include=["reasoning.encrypted_content"]).output[1].content[0].logprobs == []


# The prompt


def test_items_become_the_conversation(sdk: openai.OpenAI, stub: StubEngine) -> None:
    """The template of the model sees what it would see in chat completions."""
    items = [
        {"role": "user", "content": "one"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "thought"}]},
        {"type": "message", "role": "assistant", "id": "m", "status": "completed", "content": [
            {"type": "output_text", "text": "two", "annotations": []}, {"type": "refusal", "refusal": "!"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "thr"}, {"type": "input_text", "text": "ee"}]},
        {"role": "assistant", "content": "four"},
        {"type": "message", "role": "user", "content": "five"},
    ]  # fmt: skip
    ask(sdk, input=items, instructions="six")
    expected = [
        {"role": "system", "content": "six"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "reasoning_content": "thought", "content": "two!"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "five"},
    ]
    assert list(stub.requests[0].prompt_ids) == stub.chat.encode(expected)[0]


@pytest.mark.parametrize(("effort", "meant"), [(None, "medium"), ("none", "low"), ("low", "low"), ("xhigh", "high")])
def test_effort(sdk: openai.OpenAI, stub: StubEngine, effort: Any, meant: str) -> None:
    ask(sdk, reasoning={"effort": effort})
    assert list(stub.requests[0].prompt_ids) == stub.chat.encode([{"role": "user", "content": "hello"}], meant)[0]


def test_a_clients_loop_with_tools(tools_sdk: openai.OpenAI, tools_stub: StubEngine) -> None:
    """The output is sent back with what the functions gave, as the client's documentation says."""
    response = ask(tools_sdk, tools=[ADD, SUB])
    assert [item.type for item in response.output] == ["message", "function_call", "function_call"]
    _, add, sub = response.output
    assert (add.name, json.loads(add.arguments), add.status) == ("add", {"a": 1}, "completed")
    assert add.call_id != sub.call_id and response.output_text == "Let me see. "
    assert response.tools[0].name == "add" and response.tools[0].strict is True
    results = [{"type": "function_call_output", "call_id": item.call_id, "output": "3"} for item in (add, sub)]
    tools_stub.reply = lambda request: "done"
    again = ask(tools_sdk, tools=[ADD, SUB], input=[{"role": "user", "content": "hello"}, *response.output, *results])
    assert again.output_text == "done"
    whole = asked(tools_stub)
    dumped = [item.model_dump() for item in response.output]  # with nulls for what is not there
    ask(tools_sdk, tools=[ADD, SUB], input=[{"role": "user", "content": "hello"}, *dumped, *results])
    assert asked(tools_stub) == whole
    ask(tools_sdk, tools=[ADD, SUB], input=results, previous_response_id=response.id)
    assert asked(tools_stub) == whole
    expected = tools_stub.chat.encode(
        [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "Let me see. ", "tool_calls": [
                {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
                for item in (add, sub)]},
            {"role": "tool", "tool_call_id": add.call_id, "name": "add", "content": "3"},
            {"role": "tool", "tool_call_id": sub.call_id, "name": "sub", "content": "3"},
        ],
        tools=[{"type": "function", "function": {k: v for k, v in each.items() if k != "type"}} for each in (ADD, SUB)],
    )[0]  # fmt: skip
    assert list(tools_stub.requests[-1].prompt_ids) == expected


def test_tool_choice(tools_sdk: openai.OpenAI, tools_stub: StubEngine) -> None:
    def names(**options: Any) -> list[str]:
        return [item.name for item in ask(tools_sdk, tools=[ADD, SUB], **options).output if item.type != "message"]

    assert names() == ["add", "sub"]
    assert tools_stub.requests[-1].params.constraint is None
    assert names(parallel_tool_calls=False) == ["add"]
    assert names(tool_choice="none") == [] and tools_stub.requests[-1].tool_names == ()
    names(tool_choice="required")
    anything = tools_stub.requests[-1].params.constraint
    names(tool_choice={"type": "function", "name": "sub"})
    named = tools_stub.requests[-1].params.constraint
    assert anything and named and anything != named and "sub" in named.source
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "sub"}]}
    response = ask(tools_sdk, tools=[ADD, SUB], tool_choice=allowed)
    assert response.tool_choice.model_dump() == allowed and len(response.tools) == 2
    assert tools_stub.requests[-1].tool_names == ("sub",)
    assert refused(tools_sdk, tools=[ADD], tool_choice=allowed) == (
        "tool_choice allows 'sub', which is none of the tools: correct the name",
        "tool_choice",
    )


def test_a_form_does_not_go_with_tools(tools_sdk: openai.OpenAI) -> None:
    message, param = refused(tools_sdk, tools=[ADD], text={"format": {"type": "json_object"}})
    assert param == "text.format" and "while tools may be called" in message


# Events


def test_the_events_of_a_stream(sdk: openai.OpenAI, http: httpx2.Client) -> None:
    events = list(ask(sdk, stream=True, include=["message.output_text.logprobs"]))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    without_repeats = [kind for index, kind in enumerate(kinds) if index == 0 or kind != kinds[index - 1]]
    text = ["output_item.added", "content_part.added", "{}.delta", "{}.done", "content_part.done", "output_item.done"]
    assert without_repeats == [
        *("created", "in_progress"),
        *(kind.format("reasoning_text") for kind in text),
        *(kind.format("output_text") for kind in text),
        "completed",
    ]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == "yes"
    assert [entry.token for event in deltas for entry in event.logprobs] == ["\n", "y", "e", "s"]
    done = next(event for event in events if event.type == "response.output_text.done")
    assert (done.text, done.output_index, done.content_index, len(done.logprobs)) == ("yes", 1, 0, 4)
    items = [event.item for event in events if event.type == "response.output_item.done"]
    final = events[-1].response
    assert [item.to_dict() for item in items] == [item.to_dict() for item in final.output]
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    assert final.usage.output_tokens == 11
    with http.stream("POST", "/v1/responses", json={"model": "tiny", "input": "hello", "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    for name, data in zip(lines[::2], lines[1::2], strict=True):
        event = json.loads(data.removeprefix("data: "))
        EVENT.validate_python(event)
        assert name == f"event: {event['type']}"
        assert set(event) >= {"type", "sequence_number"}


def test_the_clients_own_reading_of_a_stream(sdk: openai.OpenAI) -> None:
    with sdk.responses.stream(model="tiny", input="hello") as events:
        snapshots = [event.snapshot for event in events if event.type == "response.output_text.delta"]
        final = events.get_final_response()
    assert snapshots == ["y", "ye", "yes"] and final.output_text == "yes"


def test_calls_in_a_stream(tools_sdk: openai.OpenAI) -> None:
    events = list(ask(tools_sdk, tools=[ADD, SUB], stream=True))
    place = [event for event in events if event.type.startswith("response.function_call_arguments")]
    assert [(event.type.rpartition(".")[2], event.output_index) for event in place] == [
        *(("delta", 1), ("done", 1)),
        *(("delta", 2), ("done", 2)),
    ]
    assert [json.loads(event.arguments) for event in place[1::2]] == [{"a": 1}, {"a": 2}]
    added = [event.item for event in events if event.type == "response.output_item.added"]
    assert [item.arguments for item in added[1:]] == ["", ""] and added[1].name == "add"
    assert [item.call_id for item in added[1:]] == [item.call_id for item in events[-1].response.output[1:]]
    with tools_sdk.responses.stream(model="tiny", input="x", tools=[ADD, SUB]) as stream:  # type: ignore[list-item]
        assert [item.type for item in stream.get_final_response().output] == ["message", *["function_call"] * 2]


def test_a_stream_that_is_cut_off_ends_with_incomplete(sdk: openai.OpenAI) -> None:
    last = list(ask(sdk, stream=True, max_output_tokens=9))[-1]
    assert last.type == "response.incomplete" and last.response.output[1].status == "incomplete"


def test_a_stream_that_fails_says_so(start: Callable[..., LiveServer], stub: StubEngine, tmp_path: Path) -> None:
    stub.pause_s = 0.05
    server = start(stub, response_store=tmp_path)
    with server.openai() as sdk:
        events = ask(sdk, stream=True)
        first = [next(events) for _ in range(6)]
        stub.is_closing = True
        *_, last = [*first, *events]
        assert last.type == "response.failed" and last.response.status == "failed"
        assert last.response.error.code == "server_error" and "the server stops" in last.response.error.message
        stub.is_closing = False
        with pytest.raises(openai.NotFoundError):
            sdk.responses.retrieve(last.response.id)


def test_an_error_before_the_first_event_has_a_status(sdk: openai.OpenAI, stub: StubEngine) -> None:
    assert refused(sdk, input="a" * CONTEXT, stream=True)[1] == "input"
    stub.failure = RuntimeError("a bug")
    with pytest.raises(openai.InternalServerError, match="the server failed on this request"):
        ask(sdk, stream=True)


def test_a_client_that_leaves_ends_the_answer(server: LiveServer, stub: StubEngine) -> None:
    stub.is_holding = True
    body = {"model": "tiny", "input": "hello"}
    with server.client() as http, pytest.raises(httpx2.ReadTimeout):
        http.post("/v1/responses", json=body, timeout=0.3)
    deadline_s = time.monotonic() + 5
    while not stub.cancelled:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
