"""The small endpoints: models, tokens, adapters, health, metrics, descriptions, the page."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from server_setup import CONTEXT, LiveServer, StubEngine
from starlette.testclient import TestClient

from openbook.core.errors import UserError
from openbook.server.app import create_app
from openbook.server.docs_page import render
from openbook.server.page import POLICY, mount_page
from openbook.server.served_model import ServedModel, ServedModels

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def test_models_and_their_adapters(start: Callable[..., LiveServer], stub: StubEngine, tiny_chat: Any) -> None:
    stub.loaded = {"fast": "/x"}
    server = start(stub, StubEngine(tiny_chat))
    with server.openai() as sdk:
        models = list(sdk.models.list())
        assert [model.id for model in models] == ["tiny", "tiny:fast", "other"]
        assert [model.to_dict()["parent"] for model in models] == [None, "tiny", None]
        assert models[0].to_dict()["aliases"] == ["tiny-alias"]
        assert models[0].to_dict()["openbook"] == {
            "max_model_len": CONTEXT,
            "is_base": False,
            "has_thinking": True,
            "has_tools": False,
            "sees_images": False,
            "efforts": ["low", "medium", "high"],
            "adapters": ["fast"],
            "profile": "exact",
            "tasks": ["gcd"],
        }
        assert sdk.models.retrieve("tiny:fast").id == "tiny:fast"
        assert sdk.models.retrieve("other-alias").id == "other"
        with pytest.raises(openai.NotFoundError, match="did you mean 'other'"):
            sdk.models.retrieve("othr")


def test_requests_find_their_model(start: Callable[..., LiveServer], stub: StubEngine, tiny_chat: Any) -> None:
    stub.loaded = {"fast": "/x"}
    other = StubEngine(tiny_chat)
    with start(stub, other).openai() as sdk:
        names = ("tiny", "tiny-alias", "tiny:fast", "tiny-alias:fast", "other")
        answered = [sdk.chat.completions.create(model=name, messages=HELLO).model for name in names]
    assert answered == ["tiny", "tiny", "tiny:fast", "tiny:fast", "other"]
    assert [request.adapter for request in stub.requests] == [None, None, "fast", "fast"]
    assert len(other.requests) == 1


def test_names_with_slashes_and_colons(stub: StubEngine) -> None:
    name = "owner/name:file.gguf"
    model = ServedModel(name=name, speaker=stub.chat, engine=stub, max_model_len=9, profile="fast")
    with TestClient(create_app([model]), base_url="http://localhost") as client:
        assert client.get(f"/v1/models/{name}").json()["id"] == name
        assert client.get("/v1/models/owner%2Fname:file.gguf").json()["id"] == name


def test_two_models_of_one_name(stub: StubEngine) -> None:
    model = ServedModel(name="a", speaker=stub.chat, engine=stub, max_model_len=9, profile="fast")
    with pytest.raises(UserError, match="two served models are called 'a': give them names with --served-name"):
        ServedModels([model, model])
    with pytest.raises(UserError, match="there is no model to serve: expected at least one"):
        ServedModels([])


def test_tokens_of_a_text_and_back(http: httpx2.Client, stub: StubEngine) -> None:
    text = "hé llo\n"
    found = http.post("/tokenize", json={"model": "tiny", "prompt": text, "return_token_strs": True}).json()
    ids = stub.chat.tokenizer.encode(text)
    assert found["tokens"] == [*stub.chat.tokenizer.start_ids, *ids]
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), CONTEXT)
    assert found["token_strs"][0] == "h" and "\ufffd" in found["token_strs"]
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}


def test_tokens_of_a_conversation(http: httpx2.Client, stub: StubEngine) -> None:
    found = http.post("/tokenize", json={"messages": HELLO, "reasoning_effort": "high"}).json()
    assert found["tokens"] == stub.chat.encode(HELLO, "high")[0] and found["token_strs"] is None


@pytest.mark.parametrize(
    ("path", "body", "message", "param"),
    [
        ("/tokenize", {}, "expected either prompt or messages: give one of them", "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "expected either prompt or messages: give one of", "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools and reasoning_effort go with messages, not with", None),
        ("/detokenize", {"tokens": [99999]}, "token id 99999 is outside the vocabulary of 274: wrong", "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0] is -1: it should be greater than or equal to 0", "tokens[0]"),
        ("/detokenize", {"tokens": "a"}, "tokens is 'a': it should be a valid list; correct that value", "tokens"),
    ],
)
def test_wrong_tokens(http: httpx2.Client, path: str, body: Any, message: str, param: str | None) -> None:
    response = http.post(path, json=body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["message"].startswith(message) and error["param"] == param


def test_adapters_are_off_unless_a_folder_is_named(http: httpx2.Client, stub: StubEngine) -> None:
    for name in ("load", "unload"):
        body = {"lora_name": "a"} if name == "unload" else {"lora_name": "a", "lora_path": "a"}
        response = http.post(f"/v1/{name}_lora_adapter", json=body)
        assert response.status_code == 403
        assert response.json()["error"]["message"] == (
            "adapters are not loaded on request here: start the server with --adapter-dir"
        )
    assert not stub.loaded


def test_adapters_come_and_go(start: Callable[..., LiveServer], stub: StubEngine, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with start(stub, adapter_dir=tmp_path).client() as client:
        load = {"lora_name": "a", "lora_path": "mine"}
        response = client.post("/v1/load_lora_adapter", json=load)
        assert response.json() == {"id": "tiny:a", "is_loaded": True}
        assert stub.loaded == {"a": str(tmp_path / "mine")}
        again = client.post("/v1/load_lora_adapter", json=load)
        assert again.json()["error"]["message"] == "there is an adapter 'a' already: unload it first"
        assert again.json()["error"]["param"] == "lora_name"
        response = client.post("/v1/unload_lora_adapter", json={"lora_name": "a"})
        assert response.json() == {"id": "tiny:a", "is_loaded": False} and not stub.loaded
        missing = client.post("/v1/unload_lora_adapter", json={"lora_name": "a"})
        assert (missing.status_code, missing.json()["error"]["param"]) == (400, "lora_name")


@pytest.mark.parametrize(
    "given", ["..", "../other", "/etc", "link", "file", "no", "a\0b", "mine/../../other", "x" * 500]
)
def test_no_adapter_from_elsewhere(
    start: Callable[..., LiveServer], stub: StubEngine, tmp_path: Path, given: str
) -> None:
    inside = tmp_path / "inside"
    for folder in (inside / "mine", tmp_path / "other"):
        folder.mkdir(parents=True)
    (inside / "link").symlink_to(tmp_path / "other")
    (inside / "file").write_text("x")
    with start(stub, adapter_dir=inside).client() as client:
        response = client.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": given})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "lora_path")
    assert "in the server's folder of adapters: give the name of a folder in it" in error["message"]
    assert not stub.loaded


def test_health(http: httpx2.Client) -> None:
    response = http.get("/health")
    assert response.json() == {"status": "ok"}
    assert response.headers["x-request-id"] != http.get("/health").headers["x-request-id"]


def test_metrics(http: httpx2.Client) -> None:
    http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "n": 2})
    http.post("/v1/chat/completions", json={"model": "no", "messages": HELLO})
    http.get("/nothing")
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert found["openbook_requests_total", "/v1/chat/completions", "200"] == 1
    assert found["openbook_requests_total", "/v1/chat/completions", "404"] == 1
    assert found["openbook_requests_total", "404", "other"] == 1
    assert found["openbook_prompt_tokens_total", "tiny"] == 8
    assert found["openbook_answer_tokens_total", "tiny"] == 22
    assert found["openbook_sequences_total", "stop", "tiny"] == 2
    assert found["openbook_time_to_first_token_seconds_count", "tiny"] == 2
    assert found["openbook_time_between_tokens_seconds_count", "tiny"] == 20
    assert found["openbook_generation_seconds_count", "tiny"] == 1
    assert found["openbook_open_requests",] == 1  # this one
    # What the engine says of itself.
    assert found["openbook_engine_running_sequences", "tiny"] == 1
    assert found["openbook_engine_waiting_requests", "tiny"] == 2
    assert (found["openbook_engine_cache_blocks", "tiny"], found["openbook_engine_cache_free_blocks", "tiny"]) == (3, 4)
    assert found["openbook_engine_steps_total", "tiny"] == 5


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: set[str] = set()
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [value or "" for name, value in attrs if name in ("href", "src")]
        self.ids |= {value or "" for name, value in attrs if name == "id"}


def test_the_description_page_asks_nobody_else(http: httpx2.Client) -> None:
    response = http.get("/docs")
    page = Links()
    page.feed(response.text)
    assert "script" not in page.tags
    assert all(link == "/openapi.json" or link[1:] in page.ids for link in page.found) and len(page.found) > 20
    for text in ("/v1/chat/completions", "thinking_budget", "Accepted, without any effect.", "reasoning_effort"):
        assert text in response.text
    assert re.search(r"style-src 'sha256-[A-Za-z0-9+/]{43}='", response.headers["content-security-policy"])


def test_the_description_page_shows_markup_as_text() -> None:
    schema = {"description": "<script>a</script>", "properties": {"<b>": {"type": "string"}}}
    api = {"info": {"title": "<i>", "version": "1"}, "paths": {}, "components": {"schemas": {"<u>": schema}}}
    page = Links()
    page.feed(render(api))
    assert not {"script", "b", "i", "u"} & page.tags


def test_every_parameter_is_described(http: httpx2.Client) -> None:
    api = http.get("/openapi.json").json()
    responses = [each["responses"] for item in api["paths"].values() for each in item.values()]
    assert not any("422" in each for each in responses)
    assert "HTTPValidationError" not in api["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest"):
        schema = api["components"]["schemas"][name]
        assert schema["additionalProperties"] is False
        plain = {"messages", "stream_options", "structured_outputs", "tools"}  # their own objects say all
        missing = {field for field, value in schema["properties"].items() if "description" not in value} - plain
        assert not missing


@pytest.fixture
def page(tmp_path: Path) -> TestClient:
    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text("<!doctype html><title>Chat</title>")
    (tmp_path / "book.svg").write_text("<svg/>")
    (tmp_path / "assets" / "index-1a2b.js").write_text("let a")
    (tmp_path / "assets" / "index-1a2b.css").write_text("a {}")
    (tmp_path.parent / "secret").write_text("secret")
    app = FastAPI()
    mount_page(app, tmp_path)
    return TestClient(app)


@pytest.mark.parametrize(
    ("path", "kind", "cache"),
    [
        ("/", "text/html; charset=utf-8", "no-cache"),
        ("/book.svg", "image/svg+xml", "no-cache"),
        ("/assets/index-1a2b.js", "text/javascript; charset=utf-8", "public, max-age=31536000, immutable"),
        ("/assets/index-1a2b.css", "text/css; charset=utf-8", "public, max-age=31536000, immutable"),
    ],
)
def test_the_page(page: TestClient, path: str, kind: str, cache: str) -> None:
    response = page.get(path)
    assert response.status_code == 200
    assert (response.headers["content-type"], response.headers["cache-control"]) == (kind, cache)
    assert response.headers["content-security-policy"] == POLICY
    assert "script-src 'self';" in POLICY and "default-src 'self';" in POLICY


def test_nothing_beside_the_page(page: TestClient) -> None:
    for path in ("/assets/../../secret", "/assets/%2e%2e/%2e%2e/secret", "/secret", "/assets/", "/no.js"):
        assert page.get(path).status_code == 404
    assert page.post("/").status_code == 405


def test_without_a_page_the_api_is_named(stub: StubEngine, tmp_path: Path) -> None:
    app = FastAPI()
    mount_page(app, tmp_path)
    from openbook.server.errors import add_error_handlers

    add_error_handlers(app)
    response = TestClient(app).get("/")
    assert response.status_code == 404
    assert response.json()["error"]["message"] == (
        "this installation has no page: the API is at /v1, described at /docs"
    )
