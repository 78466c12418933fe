"""What /v1/responses refuses, in one line that names the parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest
from responses_setup import ADD, refused
from server_setup import CONTEXT, LiveServer, StubEngine

from openbook.server.served_model import ServedModel
from openbook.tokenizer.chat import Chat

IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}


@pytest.fixture(scope="module")
def refusing(tiny_chat: Chat) -> StubEngine:
    """An engine to which nothing comes."""
    return StubEngine(tiny_chat)


@pytest.fixture(scope="module")
def server(refusing: StubEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    model = ServedModel(name="tiny", speaker=refusing.chat, engine=refusing, max_model_len=CONTEXT, profile="exact")
    live = LiveServer(model, response_store=tmp_path_factory.mktemp("store"))
    yield live
    live.stop()


@pytest.fixture(scope="module")
def sdk(server: LiveServer) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


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
def test_what_is_refused(sdk: openai.OpenAI, refusing: StubEngine, options: Any, param: str, text: str) -> None:
    message, named = refused(sdk, **options)
    assert named == param, message
    assert text in message and "\n" not in message
    assert not refusing.requests


def test_tools_that_the_template_does_not_take(sdk: openai.OpenAI) -> None:
    assert refused(sdk, tools=[ADD])[1] == "tools"


def test_a_base_model_holds_no_conversation(start: Callable[..., LiveServer], stub: StubEngine) -> None:
    with start(stub, is_base=True).openai() as sdk:
        message, param = refused(sdk)
        assert param == "model" and "use /v1/completions" in message


def test_the_content_type(http: httpx2.Client) -> None:
    answer = http.post("/v1/responses", content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
