"""/v1/chat/completions, through the official client."""

from __future__ import annotations

import httpx2
import openai
import pytest

from openbook.server.schema_chat import ChatCompletion

HELLO = [{"role": "user", "content": "hello"}]


def ask(sdk: openai.OpenAI, **options):
    return sdk.chat.completions.create(**{"model": "tiny", "messages": HELLO, **options})


def test_an_answer_has_its_thinking_apart(sdk, stub) -> None:
    answer = ask(sdk)
    [choice] = answer.choices
    assert choice.message.content == "yes"
    assert choice.message.reasoning_content == choice.message.reasoning == "hm\n"
    assert choice.finish_reason == "stop"
    assert answer.model == "tiny" and answer.object == "chat.completion"
    print(answer)


def test_stream(sdk, stub) -> None:
    for c in ask(sdk, stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2, n=2): print(c)
