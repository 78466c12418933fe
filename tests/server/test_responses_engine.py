"""/v1/responses over the real engine with nano: conversations, receipts, forms, and company that changes nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from server_setup import LiveServer

from openbook.engine.engine import EngineSettings
from openbook.engine.start import LoadOptions, start_engine
from openbook.ops.native_module import has_native
from openbook.server.from_engine import served_model

pytestmark = pytest.mark.skipif(not has_native(), reason="nano needs the native core")

QUESTION = "What is the greatest common divisor of 12 and 18?"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    started = start_engine("nano", LoadOptions(), EngineSettings(cache_bytes=64 << 20))
    live = LiveServer(served_model(started), response_store=tmp_path_factory.mktemp("store"))
    yield live
    live.stop()


@pytest.fixture(scope="module")
def sdk(server: LiveServer) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


def ask(sdk: openai.OpenAI, given: Any = QUESTION, **options: Any) -> Any:
    return sdk.responses.create(**{"model": "nano", "input": given, "temperature": 0, **options})


def test_the_same_answer_as_in_chat_completions_whole_and_in_pieces(sdk: openai.OpenAI) -> None:
    response = ask(sdk)
    chat = sdk.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": QUESTION}], temperature=0
    ).choices[0]
    assert response.output_text == chat.message.content != ""
    reasoning = response.output[0].content[0].text
    assert reasoning == chat.message.reasoning_content  # type: ignore[attr-defined]
    with sdk.responses.stream(model="nano", input=QUESTION, temperature=0) as events:
        deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
        streamed = events.get_final_response()
    assert "".join(deltas) == reasoning and len(deltas) > 10
    assert streamed.output_text == response.output_text
    usage, again = response.usage, streamed.usage
    assert again is not None and again.input_tokens_details.cached_tokens > 0  # it has the prompt already
    assert (usage.output_tokens, usage.input_tokens) == (again.output_tokens, again.input_tokens)
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens


def test_a_conversation_is_what_it_would_be_in_one_request(sdk: openai.OpenAI) -> None:
    first = ask(sdk, max_output_tokens=60)
    second = ask(sdk, "And of 12 and 16?", previous_response_id=first.id)
    items = [{"role": "user", "content": QUESTION}, *first.output, {"role": "user", "content": "And of 12 and 16?"}]
    assert ask(sdk, items).output_text == second.output_text
    alone = ask(sdk, "And of 12 and 16?")
    assert alone.usage.input_tokens < second.usage.input_tokens


def test_a_receipt_recomputes(sdk: openai.OpenAI, tmp_path: Path) -> None:
    from openbook.verify.receipts import verify_receipt

    response = ask(sdk, temperature=0.8, extra_body={"receipt": True, "seed": 5})
    receipt = response.receipt
    assert len(receipt["output_ids"]) == response.usage.output_tokens
    assert sdk.responses.retrieve(response.id).receipt == receipt  # type: ignore[attr-defined]
    path = tmp_path / "response.json"
    path.write_text(response.to_json())
    assert verify_receipt(path).verdict == "RECOMPUTED exact"
    assert not hasattr(ask(sdk), "receipt")


def test_the_answer_obeys_a_schema(sdk: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "name": "x", "schema": schema}
    response = ask(sdk, text={"format": form}, extra_body={"thinking_budget": 20})
    assert json.loads(response.output_text) in ({"a": 1}, {"a": 2})
    assert response.usage.output_tokens_details.reasoning_tokens <= 24


def test_a_wrong_schema_is_named(sdk: openai.OpenAI) -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"type": "no type"}}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(sdk, text={"format": form})
    assert caught.value.param == "text.format" and "the JSON schema" in caught.value.message


def test_company_changes_nothing(server: LiveServer, sdk: openai.OpenAI) -> None:
    """Responses, chat and embeddings at once, each as it is alone."""
    questions = [f"What is the greatest common divisor of {6 * n} and {9 * n}?" for n in range(2, 10)]
    alone = [ask(sdk, question, store=False).output_text for question in questions]
    vectors = sdk.embeddings.create(model="nano", input=questions).data

    async def go() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def respond(question: str) -> str:
                return (await client.responses.create(model="nano", input=question, temperature=0)).output_text

            async def chat(question: str) -> str | None:
                messages: Any = [{"role": "user", "content": question}]
                answer = await client.chat.completions.create(model="nano", messages=messages, temperature=0)
                return answer.choices[0].message.content

            *texts, embedded = await asyncio.gather(
                *map(respond, questions), *map(chat, questions), client.embeddings.create(model="nano", input=questions)
            )
            assert texts == [*alone, *alone]
            assert embedded.data == vectors

    asyncio.run(go())
