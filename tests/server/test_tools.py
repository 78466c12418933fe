"""Tools in chat completions: who decides, what the model is shown, and how calls come back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from server_setup import LiveServer, StubEngine

from openbook.tokenizer.chat import Chat
from openbook.tokenizer.tokenizer import Tokenizer

# Calls as Hermes and Qwen write them, in the smallest template that shows and takes them.
TEMPLATE = """\
{%- for tool in tools or [] %}<|system|>{{ tool | tojson }}{% endfor -%}
{%- for message in messages %}<|{{ message.role if message.role != 'tool' else 'user' }}|>{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor -%}
{% endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}"""
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(name: str, a: int) -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {{"a": {a}}}}}</tool_call>'


@pytest.fixture
def stub(tiny_tokenizer: Tokenizer) -> StubEngine:
    return StubEngine(
        Chat(tiny_tokenizer, TEMPLATE), reply=lambda request: "Let me see. " + call("add", 1) + call("sub", 2)
    )


@pytest.fixture
def sdk(start: Callable[..., LiveServer], stub: StubEngine) -> Iterator[openai.OpenAI]:
    with start(stub).openai() as client:
        yield client


def ask(sdk: openai.OpenAI, **options: Any) -> Any:
    return sdk.chat.completions.create(
        **{"model": "tiny", "messages": HELLO, "tools": [tool("add"), tool("sub")], **options}
    )


def test_calls_come_back(sdk: openai.OpenAI) -> None:
    [choice] = ask(sdk).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see. "
    calls = choice.message.tool_calls
    assert [(each.type, each.function.name, json.loads(each.function.arguments)) for each in calls] == [
        ("function", "add", {"a": 1}),
        ("function", "sub", {"a": 2}),
    ]
    assert len({each.id for each in calls}) == 2


def test_calls_come_in_a_stream(sdk: openai.OpenAI) -> None:
    chunks = list(ask(sdk, stream=True))
    calls = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or []]
    assert [(each.index, each.function.name, json.loads(each.function.arguments)) for each in calls] == [
        (0, "add", {"a": 1}),
        (1, "sub", {"a": 2}),
    ]
    assert all(each.id and each.type == "function" for each in calls)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_conversation_goes_on_with_the_result(sdk: openai.OpenAI, stub: StubEngine) -> None:
    message = ask(sdk).choices[0].message
    results = [{"role": "tool", "tool_call_id": each.id, "content": "3"} for each in message.tool_calls]
    stub.reply = lambda request: "done"
    answer = ask(sdk, messages=[*HELLO, message, *results]).choices[0]
    assert (answer.message.content, answer.message.tool_calls, answer.finish_reason) == ("done", None, "stop")
    assert '<tool_call>{"name": "add"' in stub.chat.tokenizer.decode(stub.requests[-1].prompt_ids)


def test_only_a_call_without_content_has_none(sdk: openai.OpenAI, stub: StubEngine) -> None:
    stub.reply = lambda request: call("add", 1)
    assert ask(sdk).choices[0].message.content is None


def test_none_hides_the_tools(sdk: openai.OpenAI, stub: StubEngine) -> None:
    [choice] = ask(sdk, tool_choice="none").choices
    assert choice.message.tool_calls is None and choice.finish_reason == "stop"
    assert "<tool_call>" in choice.message.content
    assert list(stub.requests[0].prompt_ids) == stub.chat.encode(HELLO)[0]


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_where_they_are_not_parallel(sdk: openai.OpenAI, stream: bool) -> None:
    answer = ask(sdk, parallel_tool_calls=False, stream=stream)
    if stream:
        calls = [each for chunk in answer for each in chunk.choices[0].delta.tool_calls or []]
    else:
        calls = answer.choices[0].message.tool_calls
    assert [each.function.name for each in calls] == ["add"]


def test_auto_leaves_the_answer_free(sdk: openai.OpenAI, stub: StubEngine) -> None:
    ask(sdk, tool_choice="auto")
    assert stub.requests[0].params.constraint is None
    assert stub.requests[0].tool_names == ("add", "sub")


def test_a_required_call_is_a_grammar(sdk: openai.OpenAI, stub: StubEngine) -> None:
    ask(sdk, tool_choice="required")
    ask(sdk, tool_choice="required", parallel_tool_calls=False)
    ask(sdk, tool_choice={"type": "function", "function": {"name": "sub"}})
    several, one, named = (request.params.constraint for request in stub.requests)
    assert several and one and named
    assert several.source != one.source and "add" in one.source
    assert "sub" in named.source and "add" not in named.source


@pytest.mark.parametrize(
    ("options", "message", "param"),
    [
        (
            {"tool_choice": {"type": "function", "function": {"name": "mul"}}},
            "unknown tool 'mul': given are add, sub; name one of them",
            "tool_choice",
        ),
        (
            {"tools": [], "tool_choice": "required"},
            "tool_choice asks for a call and there are no tools: give some",
            "tool_choice",
        ),
        ({"tools": [tool("a"), tool("a")]}, "two tools are called 'a': give each a name of its own", "tools"),
        (
            {"response_format": {"type": "json_object"}},
            "response_format gives the answer's form while tools may be called: leave one out, or set tool_choice to "
            "none",
            "response_format",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name is 'a b': string should match pattern '^[a-zA-Z0-9_-]{1,64}$'; correct that value",
            "tools[0].function.name",
        ),
        (
            {"tools": [{"type": "web_search"}]},
            "tools[0].type is 'web_search': it should be 'function'; correct that value",
            "tools[0].type",
        ),
    ],
)
def test_what_is_wrong_is_named(sdk: openai.OpenAI, options: dict[str, Any], message: str, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(sdk, **options)
    assert caught.value.body["message"] == message  # type: ignore[index]
    assert caught.value.body["param"] == param  # type: ignore[index]


def test_a_model_without_tools_says_so(start: Callable[..., LiveServer], tiny_chat: Chat) -> None:
    with start(StubEngine(tiny_chat)).openai() as sdk, pytest.raises(openai.BadRequestError) as caught:
        ask(sdk)
    assert "takes no tools" in str(caught.value) and caught.value.param == "tools"
