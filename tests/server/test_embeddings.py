"""/v1/embeddings through the official client, over the real engine with the tiny model."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import torch
from server_setup import LiveServer
from transformers import AutoModel

from openbook.engine.client import EngineFullError
from openbook.engine.engine import EngineSettings
from openbook.engine.start import LoadOptions, start_engine
from openbook.ops.native_module import has_native
from openbook.server import embeddings
from openbook.server.embeddings import EmbeddingList, unit_vectors
from openbook.server.from_engine import served_model

pytestmark = pytest.mark.skipif(not has_native(), reason="needs the native core")

KEY = "a-key-of-a-client"


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[LiveServer]:
    started = start_engine(str(tiny_folder), LoadOptions(), EngineSettings(cache_bytes=1 << 20))
    live = LiveServer(served_model(started))
    yield live
    live.stop()


@pytest.fixture(scope="module")
def sdk(server: LiveServer) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


@pytest.fixture(scope="module")
def http(server: LiveServer) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client


def embed(sdk: openai.OpenAI, given: Any, **options: Any) -> list[list[float]]:
    answer = sdk.embeddings.create(model="tiny", input=given, **options)
    assert [one.index for one in answer.data] == list(range(len(answer.data)))
    return [one.embedding for one in answer.data]


def refused(sdk: openai.OpenAI, given: Any, **options: Any) -> tuple[str, str | None]:
    with pytest.raises(openai.BadRequestError) as caught:
        embed(sdk, given, **options)
    body = caught.value.body
    assert isinstance(body, dict) and set(body) == {"message", "type", "param", "code"}
    return body["message"], body["param"]


def test_they_are_transformers_mean_hidden_states_of_length_1(
    sdk: openai.OpenAI, server: LiveServer, tiny_folder: Path
) -> None:
    texts = ["What is 3 plus 21?", "24", "a text of words that the tokenizer has never seen: Straße 🙂"]
    tokenizer = server.app.state.openbook.models.first.tokenizer
    model = AutoModel.from_pretrained(tiny_folder).eval()
    with torch.inference_mode():
        ids = [[*tokenizer.start_ids, *tokenizer.encode(text)] for text in texts]
        rows = [model(torch.tensor([one])).last_hidden_state[0].mean(0) for one in ids]
    expected = [torch.nn.functional.normalize(row, dim=0).numpy() for row in rows]
    found = np.array(embed(sdk, texts))
    assert np.abs(found - np.stack(expected)).max() < 1e-5
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_texts_and_token_ids_alone_and_together(sdk: openai.OpenAI, server: LiveServer) -> None:
    tokenizer = server.app.state.openbook.models.first.tokenizer
    ids = [*tokenizer.start_ids, *tokenizer.encode("hello")]
    [alone] = embed(sdk, "hello")
    assert embed(sdk, ["hello", "you", "hello"])[::2] == [alone, alone]
    assert embed(sdk, ids) == [alone]
    assert embed(sdk, [[1, 2], ids])[1] == alone
    assert embed(sdk, "you") != [alone]


def test_base64_is_the_same_numbers(http: httpx2.Client) -> None:
    def ask(**options: Any) -> Any:
        body = {"model": "tiny", "input": ["hello", "you"], **options}
        return http.post("/v1/embeddings", json=body).json()

    numbers, text = ask(encoding_format="float"), ask(encoding_format="base64")
    for one, other in zip(numbers["data"], text["data"], strict=True):
        assert np.frombuffer(base64.b64decode(other["embedding"]), "<f4").tolist() == one["embedding"]
    assert ask() == numbers
    assert EmbeddingList.model_validate(numbers).model_dump() == numbers
    assert EmbeddingList.model_validate(text).model_dump() == text


def test_usage_counts_all_texts(sdk: openai.OpenAI) -> None:
    answer = sdk.embeddings.create(model="tiny", input=[[1, 2, 3], [4]], user="me")
    assert (answer.model, answer.object) == ("tiny", "list")
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 4


def test_more_rows_than_are_written_at_once(sdk: openai.OpenAI) -> None:
    texts = [[number] for number in range(200)]
    found = embed(sdk, texts)
    assert len({tuple(row) for row in found}) == 200
    assert found[150] == embed(sdk, [150])[0]


def test_dimensions(sdk: openai.OpenAI) -> None:
    assert len(embed(sdk, "hello", dimensions=32)[0]) == 32
    assert refused(sdk, "hello", dimensions=16) == (
        "dimensions is 16: embeddings of tiny have 32; leave it out",
        "dimensions",
    )


def test_what_is_refused(sdk: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(sdk, [1] * 161) == (
        "text 1 has 161 tokens: expected 1 to 160, the model's context; shorten it",
        "input",
    )
    message, param = refused(sdk, ["a", "b" * 20_000])
    assert message.startswith("the prompt has 20,000 characters") and param == "input"
    assert refused(sdk, [[1], [999]])[1] == "input"
    assert refused(sdk, [])[1] == "input"
    assert refused(sdk, [["a"]])[1] == "input[0][0]"
    assert refused(sdk, "a", encoding_format="int8")[1] == "encoding_format"
    assert refused(sdk, "a", extra_body={"pooling": "last"}) == (
        "unknown parameter pooling: leave it out; /docs lists all",
        "pooling",
    )
    monkeypatch.setattr(embeddings, "MAX_TOKENS", 10)
    assert refused(sdk, [[1] * 6, [2] * 5]) == (
        "the texts have 11 tokens: at most 10 are taken; send them in parts",
        "input",
    )
    with pytest.raises(openai.NotFoundError, match="the model 'teeny' does not exist"):
        sdk.embeddings.create(model="teeny", input="a")


def test_an_empty_text_is_refused_or_is_what_every_text_begins_with(sdk: openai.OpenAI, server: LiveServer) -> None:
    assert server.app.state.openbook.models.first.tokenizer.start_ids == ()
    assert refused(sdk, "") == ("text 1 has 0 tokens: expected 1 to 160, the model's context; give some text", "input")


def test_metrics_and_limits(tiny_folder: Path) -> None:
    started = start_engine(str(tiny_folder), LoadOptions(), EngineSettings(cache_bytes=1 << 20))
    live = LiveServer(served_model(started), api_keys=(KEY,), tokens_per_minute=50)
    try:
        with live.openai(api_key=KEY) as sdk:
            assert len(embed(sdk, [[1] * 20, [2] * 20])) == 2
            with pytest.raises(openai.RateLimitError, match="this key has used its 50 tokens a minute"):
                embed(sdk, [[1] * 20])
        with live.client(headers={"authorization": f"Bearer {KEY}"}) as http:
            assert 'openbook_prompt_tokens_total{model="tiny"} 40.0' in http.get("/metrics").text
    finally:
        live.stop()


def test_a_full_queue_answers_429(server: LiveServer, sdk: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    async def embed_(prompts: Any, adapter: Any) -> Any:
        raise EngineFullError(9, 3)

    monkeypatch.setattr(server.app.state.openbook.models.first.engine, "embed", embed_)
    with pytest.raises(openai.RateLimitError, match="9 requests are waiting") as caught:
        embed(sdk, "hello")
    assert caught.value.response.headers["retry-after"] == "3"


def test_a_client_that_leaves_ends_the_work(server: LiveServer) -> None:
    engine = server.app.state.openbook.models.first.engine.engine
    before = engine.stats().num_prompt_tokens
    with server.client() as http, pytest.raises(httpx2.ReadTimeout):
        http.post("/v1/embeddings", json={"model": "tiny", "input": [[5] * 150] * 1900}, timeout=0.3)
    deadline_s = time.monotonic() + 5
    while engine.has_work:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert engine.stats().num_prompt_tokens - before < 1900 * 150


def test_unit_vectors() -> None:
    rows = np.array([[3, 4], [0, 0], [1e-30, 0], [1e30, 1e30]], np.float32)
    np.testing.assert_allclose(unit_vectors(rows), [[0.6, 0.8], [0, 0], [1, 0], [0.5**0.5] * 2], atol=1e-7)
