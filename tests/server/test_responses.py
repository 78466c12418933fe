"""/v1/responses through the official client: what a response holds, its events, what is stored and what is refused."""

from __future__ import annotations

import asyncio
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
from server_setup import CONTEXT, LiveServer, StubEngine
from test_tools import TEMPLATE, call

from openbook.server.response_store import FILE_NAME
from openbook.server.schema_responses import ItemList, ResponseObject
from openbook.tokenizer.chat import Chat
from openbook.tokenizer.tokenizer import Tokenizer

EVENT = TypeAdapter(ResponseStreamEvent)
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
KEYS = ("a-key-of-alice", "a-key-of-bob")
ADD = {
    "type": "function",
    "name": "add",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    "strict": True,
}
SUB = {**ADD, "name": "sub"}


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


def ask(sdk: openai.OpenAI, **options: Any) -> Any:
    return sdk.responses.create(**{"model": "tiny", "input": "hello", **options})


def refused(sdk: openai.OpenAI, **options: Any) -> tuple[str, str | None]:
    """The message and the parameter of an answer with status 400."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(sdk, **options)
    body = caught.value.body
    assert isinstance(body, dict) and set(body) == {"message", "type", "param", "code"}
    return body["message"], body["param"]


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
def test_effort(tools_sdk: openai.OpenAI, sdk: openai.OpenAI, stub: StubEngine, effort: Any, meant: str) -> None:
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


# The store


def test_conversations(sdk: openai.OpenAI, stub: StubEngine) -> None:
    first = ask(sdk, input="one", instructions="be brief", metadata={"a": "b"})
    second = ask(sdk, input="two", previous_response_id=first.id)
    other = ask(sdk, input="three", previous_response_id=first.id, instructions="be long")
    ask(sdk, input="four", previous_response_id=second.id, store=False)
    answered = {"role": "assistant", "reasoning_content": "hm\n", "content": "yes"}
    expected = [{"role": "user", "content": "one"}, answered, {"role": "user", "content": "two"}, answered]
    expected = [*expected, {"role": "user", "content": "four"}]
    assert list(stub.requests[-1].prompt_ids) == stub.chat.encode(expected)[0]  # instructions are not carried over
    assert asked(stub).count("one") == 1
    assert second.previous_response_id == first.id and other.instructions == "be long"


def test_retrieving_and_deleting(sdk: openai.OpenAI, http: httpx2.Client) -> None:
    response = ask(sdk, metadata={"a": "b"})
    assert sdk.responses.retrieve(response.id).to_dict() == response.to_dict()
    assert sdk.responses.retrieve(response.id, include=["message.output_text.logprobs"]).id == response.id
    streamed = list(ask(sdk, stream=True))[-1].response
    assert sdk.responses.retrieve(streamed.id).to_dict() == streamed.to_dict()
    incomplete = ask(sdk, max_output_tokens=2)
    assert sdk.responses.retrieve(incomplete.id).status == "incomplete"
    sdk.responses.delete(response.id)
    for attempt in (sdk.responses.retrieve, sdk.responses.delete, sdk.responses.cancel, sdk.responses.input_items.list):
        with pytest.raises(openai.NotFoundError) as caught:
            attempt(response.id)
        assert f"there is no response '{response.id}': it was not stored" in caught.value.message
    assert http.delete(f"/v1/responses/{streamed.id}").json() == {
        "id": streamed.id,
        "object": "response",
        "deleted": True,
    }


def test_what_is_not_stored_is_not_there(sdk: openai.OpenAI) -> None:
    response = ask(sdk, store=False)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(response.id)
    message, param = refused(sdk, previous_response_id=response.id)
    assert message.startswith(f"there is no response '{response.id}'") and param == "previous_response_id"


def test_a_deleted_response_ends_its_conversation(sdk: openai.OpenAI) -> None:
    first = ask(sdk)
    second = ask(sdk, previous_response_id=first.id)
    third = ask(sdk, previous_response_id=second.id)
    sdk.responses.delete(first.id)
    assert sdk.responses.retrieve(third.id).id == third.id
    assert refused(sdk, previous_response_id=third.id) == (
        f"a response before {third.id} was deleted: send the conversation as input",
        "previous_response_id",
    )


def test_nothing_here_runs_in_the_background(sdk: openai.OpenAI) -> None:
    response = ask(sdk)
    with pytest.raises(openai.BadRequestError, match="the response is complete: only one in the background"):
        sdk.responses.cancel(response.id)
    assert refused(sdk, background=True) == (
        "nothing is answered in the background: use stream, or wait for the answer; leave it out",
        "background",
    )


def test_input_items(sdk: openai.OpenAI, http: httpx2.Client) -> None:
    first = ask(sdk, input=[{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}])
    second = ask(sdk, input="three", previous_response_id=first.id)
    items = list(sdk.responses.input_items.list(second.id, order="asc"))
    assert [(item.type, item.content[0].text) for item in items] == [  # type: ignore[union-attr]
        *(("message", "one"), ("message", "two")),
        *(("reasoning", "hm\n"), ("message", "yes"), ("message", "three")),
    ]
    assert [part.type for item in items for part in item.content][:2] == ["input_text", "output_text"]  # type: ignore[union-attr]
    assert len({item.id for item in items}) == 5
    paged = list(sdk.responses.input_items.list(second.id, limit=2))  # the client asks for page after page
    assert [item.id for item in paged] == [item.id for item in reversed(items)]
    page = http.get(f"/v1/responses/{second.id}/input_items?limit=2&order=asc&after={items[1].id}").json()
    assert [item["id"] for item in page["data"]] == [items[2].id, items[3].id]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (items[2].id, items[3].id, True)
    assert ItemList.model_validate(page).model_dump(mode="json", exclude_unset=True) == page
    for query, param in (("limit=0", "limit"), ("order=up", "order"), ("after=x", "after"), ("before=x", "before")):
        answer = http.get(f"/v1/responses/{second.id}/input_items?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), query
    assert http.get(f"/v1/responses/{second.id}?stream=true").json()["error"]["param"] == "stream"


def test_without_a_store(start: Callable[..., LiveServer], stub: StubEngine) -> None:
    with start(stub).openai() as sdk:
        response = ask(sdk)
        assert response.output_text == "yes" and response.store is False
        message, param = refused(sdk, store=True)
        assert param == "store" and "start the server with --response-store" in message
        assert refused(sdk, previous_response_id=response.id) == (
            f"there is no response '{response.id}': nothing is stored here",
            "previous_response_id",
        )
        with pytest.raises(openai.NotFoundError, match="nothing is stored here"):
            sdk.responses.retrieve(response.id)


def test_each_key_has_responses_of_its_own(start: Callable[..., LiveServer], stub: StubEngine, tmp_path: Path) -> None:
    server = start(stub, response_store=tmp_path, api_keys=KEYS)
    with server.openai(api_key=KEYS[0]) as alice, server.openai(api_key=KEYS[1]) as bob:
        response = ask(alice)
        assert alice.responses.retrieve(response.id).id == response.id
        for attempt in (bob.responses.retrieve, bob.responses.delete, bob.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                attempt(response.id)
        assert refused(bob, previous_response_id=response.id)[1] == "previous_response_id"
        assert ask(alice, previous_response_id=response.id).output_text == "yes"
    assert not any(key.encode() in (tmp_path / FILE_NAME).read_bytes() for key in KEYS)


def test_a_conversation_outlives_the_server(start: Callable[..., LiveServer], tiny_chat: Chat, tmp_path: Path) -> None:
    """With keys that are given otherwise, plain and hashed: it is the key that counts."""
    from openbook.server.auth import hash_key

    before = start(StubEngine(tiny_chat), response_store=tmp_path, api_keys=KEYS)
    with before.openai(api_key=KEYS[1]) as sdk:
        response = ask(sdk)
    before.stop()
    after = start(StubEngine(tiny_chat), response_store=tmp_path, api_keys=(hash_key(KEYS[1]),))
    with after.openai(api_key=KEYS[1]) as sdk:
        assert ask(sdk, previous_response_id=response.id).previous_response_id == response.id


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_disk_harms_only_what_is_to_be_stored(
    server: LiveServer, sdk: openai.OpenAI, stub: StubEngine, stream: bool
) -> None:
    kept = ask(sdk)
    store = server.app.state.openbook.responses
    connection = store._open()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    metadata = {f"{number}": "x" * 512 for number in range(16)}  # more than the pages that are there have room for
    num_asked = len(stub.requests)
    if stream:
        last = list(ask(sdk, stream=True, metadata=metadata))[-1]
        assert last.type == "response.failed" and "the disk is full; send store: false" in last.response.error.message
    else:
        with pytest.raises(
            openai.InternalServerError, match="the response cannot be stored: the disk is full"
        ) as caught:
            ask(sdk, metadata=metadata)
        assert (caught.value.status_code, caught.value.code, caught.value.param) == (507, "store_failed", "store")
    assert ask(sdk, metadata=metadata, store=False).output_text == "yes"
    chat = sdk.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])
    assert chat.choices[0].message.content == "yes"
    assert sdk.responses.retrieve(kept.id).id == kept.id
    assert len(stub.requests) == num_asked + 3
    connection.execute("PRAGMA max_page_count = 1000000")
    assert ask(sdk, metadata=metadata, previous_response_id=kept.id).output_text == "yes"


def test_a_store_that_cannot_be_written_is_found_out_before_anything_is_computed(
    start: Callable[..., LiveServer], stub: StubEngine, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with start(stub, response_store=tmp_path / "file" / "store").openai() as sdk:
        with pytest.raises(openai.InternalServerError, match="cannot be stored: Not a directory") as caught:
            ask(sdk)
        assert caught.value.status_code == 507 and not stub.requests
        with pytest.raises(openai.InternalServerError, match="stored responses cannot be read now") as caught:
            ask(sdk, store=False, previous_response_id="resp_1")
        assert caught.value.status_code == 503 and str(tmp_path) not in caught.value.message
        assert ask(sdk, store=False).output_text == "yes"


def test_many_at_once_are_all_stored(server: LiveServer) -> None:
    async def go() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk:

            async def talk(number: int) -> list[str]:
                previous, ids = None, []
                for turn in range(3):
                    response = await sdk.responses.create(
                        model="tiny", input=f"{number} {turn}", previous_response_id=previous
                    )
                    previous = response.id
                    ids.append(previous)
                return ids

            for number, ids in enumerate(await asyncio.gather(*(talk(number) for number in range(20)))):
                page = await sdk.responses.input_items.list(ids[-1], order="asc")
                texts = [item.content[0].text for item in page.data if getattr(item, "role", "") == "user"]  # type: ignore
                assert texts == [f"{number} {turn}" for turn in range(3)]

    asyncio.run(go())


# What is refused


@pytest.mark.parametrize(
    ("options", "param", "text"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "the tool 'web_search' runs on OpenAI's servers"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0]", "the tool 'mcp' runs on OpenAI's servers"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type", "expected one of 'function', 'allowed_tools'"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice asks for a call and there are no tools"),
        ({"truncation": "auto"}, "truncation", "nothing is cut off a conversation: what is too long is refused"),
        ({"conversation": "conv_1"}, "conversation", "use previous_response_id"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "send the text as input and instructions"),
        ({"max_tool_calls": 3}, "max_tool_calls", "it limits tools that a server runs"),
        ({"context_management": [{"type": "compaction"}]}, "context_management", "nothing is cut off"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "nothing sums up the thinking here"),
        ({"include": ["web_search_call.results"]}, "include[0]", "message.output_text.logprobs"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs is given without message.output_text.logprobs in include"),
        ({"extra_body": {"n": 2}}, "n", "a response has one answer"),
        ({"extra_body": {"max_tokens": 2}}, "max_tokens", "unknown parameter max_tokens"),
        ({"extra_body": {"response_format": {"type": "text"}}}, "response_format", "given in text.format"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", "set stream to true"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "say in a message how long to be"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "is missing"),
        ({"metadata": {"a": "b" * 513}}, "metadata.a", "at most 512 characters"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": ""}, "input", "at least 1 character"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type", "is 'web_search_call': expected one of"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "is 'item_reference': expected one of"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "'assistant', 'system' or 'developer'"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type", "input_file"),
        ({"input": [{"role": "user", "content": "x", "nme": "y"}]}, "input[0].nme", "unknown parameter input[0].nme"),
        (
            {"input": [{"role": "user", "content": [{**IMAGE, "image_url": "https://example.org/x.png"}]}]},
            "input[0].content[0].image_url",
            "nothing is fetched for a request",
        ),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input", "image"),
        ({"input": [{"role": "system", "content": [IMAGE]}]}, "input", "a message that is not the user's"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": "3"}]},
            "input",
            "an output belongs to the call 'c', and there is no such call before it",
        ),
        (
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]},
            "input[0].encrypted_content",
            "thinking is not encrypted here",
        ),
        ({"input": "a" * CONTEXT}, "input", "the prompt has"),
        ({"input": "a" * 65 * CONTEXT}, "input", "characters"),
        (
            {"text": {"format": {"type": "json_object"}}, "extra_body": {"guided_regex": "a"}},
            "text.format",
            "text.format and guided_regex give more than one form",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(sdk: openai.OpenAI, stub: StubEngine, options: Any, param: str, text: str) -> None:
    message, named = refused(sdk, **options)
    assert named == param, message
    assert text in message and "\n" not in message
    assert not stub.requests


def test_a_form_does_not_go_with_tools(tools_sdk: openai.OpenAI) -> None:
    message, param = refused(tools_sdk, tools=[ADD], text={"format": {"type": "json_object"}})
    assert param == "text.format" and "while tools may be called" in message


def test_tools_that_the_template_does_not_take(sdk: openai.OpenAI) -> None:
    assert refused(sdk, tools=[ADD])[1] == "tools"


def test_a_base_model_holds_no_conversation(start: Callable[..., LiveServer], stub: StubEngine) -> None:
    with start(stub, is_base=True).openai() as sdk:
        message, param = refused(sdk)
        assert param == "model" and "use /v1/completions" in message


def test_the_content_type(http: httpx2.Client) -> None:
    answer = http.post("/v1/responses", content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
