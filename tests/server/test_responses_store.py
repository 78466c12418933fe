"""Responses that are kept: conversations, items, whose they are, and a disk that is full."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx2
import openai
import pytest
from responses_setup import ask, refused
from server_setup import LiveServer, StubEngine

from openbook.server.auth import hash_key
from openbook.server.response_store import FILE_NAME
from openbook.server.schema_responses import ItemList
from openbook.tokenizer.chat import Chat

KEYS = ("a-key-of-alice", "a-key-of-bob")


@pytest.fixture
def server(start: Callable[..., LiveServer], stub: StubEngine, tmp_path: Path) -> LiveServer:
    return start(stub, response_store=tmp_path / "store")


def test_conversations(sdk: openai.OpenAI, stub: StubEngine) -> None:
    first = ask(sdk, input="one", instructions="be brief", metadata={"a": "b"})
    second = ask(sdk, input="two", previous_response_id=first.id)
    other = ask(sdk, input="three", previous_response_id=first.id, instructions="be long")
    ask(sdk, input="four", previous_response_id=second.id, store=False)
    answered = {"role": "assistant", "reasoning_content": "hm\n", "content": "yes"}
    expected = [{"role": "user", "content": "one"}, answered, {"role": "user", "content": "two"}, answered]
    expected = [*expected, {"role": "user", "content": "four"}]
    assert list(stub.requests[-1].prompt_ids) == stub.chat.encode(expected)[0]  # instructions are not carried over
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
