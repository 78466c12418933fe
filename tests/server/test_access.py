"""Keys, limits, host names, origins, and the headers of every answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from server_setup import LiveServer, StubEngine

from openbook.core.errors import UserError
from openbook.engine.client import EngineFullError
from openbook.server.auth import KeyRing, hash_key, new_key, read_keys
from openbook.server.limits import Account, Bucket, duration
from openbook.server.settings import ServerSettings

HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
PATH = "/v1/chat/completions"
KEYS = ("first-secret", "second-secret")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_key_opens_the_api(start: Callable[..., LiveServer], stub: StubEngine) -> None:
    server = start(stub, api_keys=(KEYS[0], hash_key(KEYS[1])))
    for key in KEYS:
        with server.openai(api_key=key) as sdk:
            assert [model.id for model in sdk.models.list()] == ["tiny"]
    with server.openai(api_key="wrong-secret") as sdk, pytest.raises(openai.AuthenticationError) as caught:
        sdk.models.list()
    assert caught.value.body == {
        "message": "the API key is wrong: send the header `Authorization: Bearer KEY` with a valid one",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }
    assert not stub.requests


@pytest.mark.parametrize("path", [PATH, "/v1/models", "/v1/nothing", "/tokenize", "/detokenize", "/metrics"])
def test_without_a_key_everything_is_closed_but_the_page(
    start: Callable[..., LiveServer], stub: StubEngine, path: str
) -> None:
    with start(stub, api_keys=KEYS).client() as client:
        for headers in (
            {},
            {"authorization": "Basic Zmlyc3Q="},
            {"authorization": "first-secret"},
            {"authorization": "Bearer"},
        ):
            for method in ("GET", "POST"):
                response = client.request(method, path, headers=headers)
                assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        for path_of_all in ("/health", "/docs", "/openapi.json"):
            assert client.get(path_of_all).status_code == 200


def test_keys_are_kept_hashed() -> None:
    ring = KeyRing(KEYS)
    assert [ring.find(key) for key in KEYS] == [0, 1]
    assert {ring.find(key) for key in ("third-secret", "", "fïrst-secret", "\ud800")} == {None}
    kept = repr(ring.__dict__)
    assert not any(key in kept or key.encode().hex() in kept for key in KEYS)
    assert hash_key(KEYS[0]) != hash_key(KEYS[0])  # salted
    assert KeyRing([hash_key(KEYS[0])]).find(KEYS[0]) == 0
    assert new_key() != new_key() and len(new_key()) > 40


def test_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n first-secret \n{hash_key(KEYS[1])}\n")
    ring = KeyRing(read_keys(file))
    assert [ring.find(key) for key in KEYS] == [0, 1]
    file.write_text("# none\n")
    with pytest.raises(UserError, match=f"the file of API keys {file} holds none: write one key a line"):
        read_keys(file)
    file.write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not UTF-8 text: write one key a line"):
        read_keys(file)
    with pytest.raises(UserError, match=r"cannot read the file of API keys .*/no: No such file"):
        read_keys(tmp_path / "no")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("short", "an API key has 5 characters: expected at least 8; take a longer one"),
        ("sha256$12$34", "an API key begins with sha256$ but is no hash: expected sha256$SALT$DIGEST; make a new one"),
    ],
)
def test_what_is_no_key(key: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        KeyRing([key])
    assert str(caught.value) == message


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_bucket_grows_back_within_a_minute() -> None:
    clock = Clock()
    bucket = Bucket(30, clock)
    bucket.spend(30)
    assert (bucket.left, bucket.wait_s(1), bucket.wait_s(30)) == (0, 2, 60)
    clock.now_s += 10
    assert bucket.left == 5
    bucket.spend(20)
    assert bucket.left == -15 and bucket.wait_s(1) == 32
    clock.now_s += 3600
    assert bucket.left == 30
    assert dict(bucket.headers("tokens")) == {
        "x-ratelimit-limit-tokens": "30",
        "x-ratelimit-remaining-tokens": "30",
        "x-ratelimit-reset-tokens": "0ms",
    }


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.0201, "21ms"), (3.45, "3.5s"), (59, "59s"), (360, "6m0s")]
)
def test_durations_as_in_the_openai_api(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_requests_a_minute(start: Callable[..., LiveServer], stub: StubEngine) -> None:
    server = start(stub, api_keys=KEYS, requests_per_minute=2)
    with server.client() as client:
        answers = [client.post(PATH, json=HELLO, headers=bearer(KEYS[0])) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        remaining = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
        assert remaining == ["1", "0", "0"]
        assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
        last = answers[2]
        assert 1 <= int(last.headers["retry-after"]) <= 30
        error = last.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert error["message"].startswith("this key has used its 2 requests a minute: try again in ")
        assert client.post(PATH, json=HELLO, headers=bearer(KEYS[1])).status_code == 200  # each has its own


def test_tokens_a_minute(start: Callable[..., LiveServer], stub: StubEngine) -> None:
    server = start(stub, api_keys=KEYS, tokens_per_minute=30)
    with server.client(headers=bearer(KEYS[0])) as client:
        first = client.post(PATH, json=HELLO)
        used = first.json()["usage"]["total_tokens"]
        assert first.status_code == 200 and used == 19
        assert first.headers["x-ratelimit-remaining-tokens"] in ("11", "12")
        assert "x-ratelimit-limit-requests" not in first.headers
        client.post(PATH, json=HELLO)
        third = client.post(PATH, json=HELLO)
        assert third.status_code == 429 and int(third.headers["retry-after"]) >= 1
        assert third.json()["error"]["message"].startswith("this key has used its 30 tokens a minute: try again in ")
        long = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 100}]}
        assert client.post(PATH, json=long).json()["error"]["message"] == (
            "the prompt has 103 tokens and this key has 30 a minute: shorten it"
        )


def test_what_is_turned_away_costs_nothing(start: Callable[..., LiveServer], stub: StubEngine) -> None:
    stub.failure = EngineFullError(7, retry_after_s=3)
    server = start(stub, api_keys=KEYS, tokens_per_minute=30)
    with server.client(headers=bearer(KEYS[0])) as client:
        response = client.post(PATH, json=HELLO)
    assert response.status_code == 429 and response.headers["x-ratelimit-remaining-tokens"] == "30"


def test_a_long_answer_is_owed() -> None:
    clock = Clock()
    account = Account(None, 60, clock)
    account.admit_prompt(10)
    account.spend_tokens(70)
    clock.now_s += 20
    with pytest.raises(Exception, match="try again in 1 s"):
        account.admit_prompt(1)
    clock.now_s += 1
    account.admit_prompt(1)


def test_limits_need_keys() -> None:
    with pytest.raises(UserError) as caught:
        ServerSettings(requests_per_minute=5)
    assert str(caught.value) == (
        "requests_per_minute is 5, but limits are kept per key and there is none: give --api-key"
    )


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", ""])
def test_a_page_elsewhere_cannot_borrow_the_name(http: httpx2.Client, stub: StubEngine, host: str) -> None:
    for method, path in (("POST", PATH), ("GET", "/"), ("GET", "/v1/models")):
        response = http.request(method, path, headers={"host": host})
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "host_not_allowed"
        assert "start it with --allowed-host" in response.json()["error"]["message"]
    assert not stub.requests


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]", "[::1]:8000", "10.1.2.3:80"])
def test_addresses_and_localhost_are_fine(http: httpx2.Client, host: str) -> None:
    assert http.get("/v1/models", headers={"host": host}).status_code == 200


def test_other_names_are_fine_if_told(start: Callable[..., LiveServer], stub: StubEngine) -> None:
    with start(stub, allowed_hosts=("ai.example",)).client() as client:
        assert client.get("/health", headers={"host": "ai.example:80"}).status_code == 200
        assert client.get("/health", headers={"host": "other.example"}).status_code == 403


def test_names_count_where_no_key_is_asked_for() -> None:
    assert ServerSettings().checks_host
    assert ServerSettings(api_keys=KEYS).checks_host
    assert ServerSettings(host="0.0.0.0").checks_host
    assert not ServerSettings(host="0.0.0.0", api_keys=KEYS).checks_host


def test_no_page_elsewhere_may_read(http: httpx2.Client) -> None:
    response = http.get("/v1/models", headers={"origin": "https://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert http.options(PATH, headers=asked).status_code == 405


def test_an_origin_that_may(start: Callable[..., LiveServer], stub: StubEngine) -> None:
    with start(stub, cors_origins=("https://good.example",), api_keys=KEYS).client() as client:
        asked = {
            "origin": "https://good.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-stainless-lang",
        }
        allowed = client.options(PATH, headers=asked)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://good.example"
        assert "x-stainless-lang" in allowed.headers["access-control-allow-headers"]
        # An error can be read, too.
        response = client.post(PATH, json=HELLO, headers={"origin": "https://good.example"})
        assert response.status_code == 401
        assert response.headers["access-control-allow-origin"] == "https://good.example"
        other = client.post(PATH, json=HELLO, headers={"origin": "https://evil.example", **bearer(KEYS[0])})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nothing", "/docs", "/openapi.json"])
def test_every_answer_has_security_headers(http: httpx2.Client, path: str) -> None:
    headers = http.get(path).headers
    expected: dict[str, Any] = {
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-store",
    }
    assert {name: headers[name] for name in expected} == expected
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "server" not in headers
