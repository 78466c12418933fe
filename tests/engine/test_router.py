"""Several engines as one: where requests go, and what happens when a replica is full, ends or refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from stub_replica import StubReplica, asked, down, full

from openbook.core.errors import UserError
from openbook.engine.client import EngineDownError, EngineFullError
from openbook.engine.events import SequenceEvent
from openbook.engine.paged import BLOCK_TOKENS
from openbook.engine.remote_engine import NO_STATS
from openbook.engine.request import Request
from openbook.engine.router import MOST_AHEAD, RoutedEngine
from openbook.tokenizer.images import ImagePatches

LONG = 40 * BLOCK_TOKENS  # tokens: a prefix worth waiting for


class Clients:
    """Requests that run on a routed engine over stubs."""

    def __init__(self, num_replicas: int = 2) -> None:
        self.stubs = [StubReplica() for _ in range(num_replicas)]
        self.engine = RoutedEngine(self.stubs)
        self.tasks: dict[str, asyncio.Task[list[SequenceEvent]]] = {}

    async def ask(self, name: str, prompt_ids: list[int], **changes: Any) -> int | None:
        """Submit a request; the number of the replica that has it then."""

        async def collect(request: Request) -> list[SequenceEvent]:
            return [event async for event in self.engine.submit(request)]

        self.tasks[name] = asyncio.create_task(collect(asked(name, prompt_ids, **changes)))
        await settle()
        return next((number for number, stub in enumerate(self.stubs) if name in stub.queues), None)

    async def finish(self, name: str) -> list[SequenceEvent]:
        """Let a request end."""
        for stub in self.stubs:
            if name in stub.queues:
                stub.say(name, is_last=True)
        return await self.tasks[name]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def with_clients(work: Callable[[Clients], Awaitable[None]], num_replicas: int = 2) -> None:
    async def go() -> None:
        clients = Clients(num_replicas)
        await asyncio.wait_for(work(clients), 10)
        for task in clients.tasks.values():
            task.cancel()
        await asyncio.gather(*clients.tasks.values(), return_exceptions=True)

    asyncio.run(go())


def prompt(first: int, num_tokens: int = LONG, last: int = 0) -> list[int]:
    return [first] * num_tokens + [last]


def test_unlike_prompts_are_spread_evenly() -> None:
    async def work(clients: Clients) -> None:
        places = [await clients.ask(str(number), prompt(number)) for number in range(9)]
        assert sorted(places) == [0] * 3 + [1] * 3 + [2] * 3

    with_clients(work, 3)


def test_requests_that_follow_each_other_take_turns() -> None:
    async def work(clients: Clients) -> None:
        places = []
        for number in range(4):
            places.append(await clients.ask(str(number), prompt(number)))
            await clients.finish(str(number))
        assert places == [0, 1, 0, 1]

    with_clients(work)


def test_a_shared_prefix_goes_to_the_same_replica_until_that_is_too_busy() -> None:
    async def work(clients: Clients) -> None:
        first = await clients.ask("a", prompt(1))
        places = [await clients.ask(f"a{n}", prompt(1, last=n)) for n in range(2 * MOST_AHEAD)]
        assert places[: MOST_AHEAD - 1] == [first] * (MOST_AHEAD - 1)
        assert len(set(places)) == 2
        ahead = places.count(first) + 1 - places.count(1 - first)
        assert abs(ahead) <= MOST_AHEAD  # and it evens out, once both have the prefix
        assert len(clients.stubs[0].queues) == len(clients.stubs[1].queues) + 1

    with_clients(work)


def test_a_conversation_returns_to_the_replica_that_has_it() -> None:
    async def work(clients: Clients) -> None:
        turns = {name: prompt(number, 3 * BLOCK_TOKENS) for number, name in enumerate("abcd")}
        homes = {}
        for turn in range(4):
            for name in sorted(turns, reverse=turn % 2 == 1):
                place = await clients.ask(f"{name}{turn}", turns[name])
                assert homes.setdefault(name, place) == place
                await clients.finish(f"{name}{turn}")
                turns[name] += [turn] * 20
        assert sorted(homes.values()) == [0, 0, 1, 1]

    with_clients(work)


def test_a_short_prefix_is_not_worth_waiting_for() -> None:
    async def work(clients: Clients) -> None:
        first = await clients.ask("a", prompt(1, BLOCK_TOKENS))
        assert await clients.ask("b", prompt(1, BLOCK_TOKENS)) == 1 - first

    with_clients(work)


def test_samples_count_as_sequences_and_ended_requests_do_not() -> None:
    async def work(clients: Clients) -> None:
        assert await clients.ask("many", prompt(1), num_samples=3) == 0
        assert [await clients.ask(f"one {n}", prompt(2 + n)) for n in range(3)] == [1, 1, 1]
        clients.tasks["many"].cancel()
        await settle()
        assert clients.stubs[0].cancelled == ["many"]
        assert await clients.ask("next", prompt(9)) == 0

    with_clients(work)


@pytest.mark.parametrize("difference", ["adapter", "image"])
def test_a_prefix_with_another_adapter_or_image_is_another(difference: str) -> None:
    def image(value: float) -> ImagePatches:
        return ImagePatches(np.full((4, 2), value, dtype=np.float32), (2, 2), 1)

    changes = {"adapter": [{"adapter": "x"}, {}], "image": [{"images": [image(n)]} for n in range(2)]}[difference]

    async def work(clients: Clients) -> None:
        for number, change in enumerate(changes):
            assert await clients.ask(str(number), prompt(1), **change) == number
            await clients.finish(str(number))
        for number, change in reversed(list(enumerate(changes))):
            assert await clients.ask(f"again {number}", prompt(1), **change) == number
            await clients.finish(f"again {number}")

    with_clients(work)


def test_a_replica_that_was_started_again_has_nothing_cached() -> None:
    async def work(clients: Clients) -> None:
        assert await clients.ask("a", prompt(1)) == 0
        await clients.finish("a")
        clients.stubs[0].num_starts = 2
        assert await clients.ask("b", prompt(1)) == 1  # whose turn it is

    with_clients(work)


def test_it_remembers_no_more_than_a_cache_can_hold() -> None:
    async def work(clients: Clients) -> None:
        for number in range(2):  # 40 blocks each, where 64 fit: the second leaves 24 of the first
            await clients.ask(str(number), prompt(number))
            await clients.finish(str(number))
        place = clients.engine._places[0]
        assert place.num_cached_tokens([b"none"]) == 0
        assert len(place._prefixes) == 64

    with_clients(work, 1)


def test_a_full_replica_is_passed_over_and_all_full_is_an_error() -> None:
    async def work(clients: Clients) -> None:
        clients.stubs[0].refusal = EngineFullError(5, 9)
        assert await clients.ask("a", prompt(1)) == 1
        clients.stubs[1].refusal = full()
        await clients.ask("b", prompt(2))
        with pytest.raises(EngineFullError, match="7 requests are waiting: try again in 3 s"):
            await clients.tasks["b"]

    with_clients(work)


def test_a_replica_that_is_down_gets_nothing() -> None:
    async def work(clients: Clients) -> None:
        clients.stubs[0].is_up = False
        assert [await clients.ask(str(n), prompt(n)) for n in range(3)] == [1, 1, 1]
        clients.stubs[1].is_up = False
        await clients.ask("x", prompt(1))
        with pytest.raises(EngineDownError, match="no engine is up: try again in 1 s"):
            await clients.tasks["x"]

    with_clients(work)


def test_a_request_whose_replica_ends_before_its_first_event_is_asked_once_more() -> None:
    async def work(clients: Clients) -> None:
        assert await clients.ask("a", prompt(1)) == 0
        clients.stubs[0].fail("a", down())
        await settle()
        assert "a" in clients.stubs[1].queues
        assert [event.finish_reason for event in await clients.finish("a")] == ["stop"]
        assert clients.stubs[2].seen == []

        await clients.ask("killer", prompt(2))
        for stub in (clients.stubs[2], clients.stubs[0]):
            stub.fail("killer", down())
            await settle()
        with pytest.raises(EngineDownError, match="killed by SIGKILL"):
            await clients.tasks["killer"]
        assert "killer" not in clients.stubs[1].seen

    with_clients(work, 3)


def test_a_request_that_has_begun_is_never_asked_twice() -> None:
    async def work(clients: Clients) -> None:
        await clients.ask("a", prompt(1))
        clients.stubs[0].say("a", 5)
        last = SequenceEvent(request_id="a", index=0, finish_reason="error", error="it was killed")
        clients.stubs[0].queues["a"].put_nowait(last)
        assert [event.error for event in await clients.tasks["a"]] == [None, "it was killed"]
        assert clients.stubs[1].seen == []

    with_clients(work)


def test_a_wrong_request_is_refused_once() -> None:
    async def work(clients: Clients) -> None:
        clients.stubs[0].refusal = UserError("the prompt is empty")
        await clients.ask("a", [])
        with pytest.raises(UserError, match="the prompt is empty"):
            await clients.tasks["a"]
        assert clients.stubs[1].seen == []

    with_clients(work)


def test_closing_the_events_cancels_the_request() -> None:
    async def work(clients: Clients) -> None:
        events = clients.engine.submit(asked("a", prompt(1)))
        async with aclosing(events):  # type: ignore[type-var]
            reading = asyncio.ensure_future(anext(events))
            await settle()
            clients.stubs[0].say("a")
            await reading
        assert clients.stubs[0].cancelled == ["a"]

    with_clients(work)


def test_statistics_are_sums() -> None:
    async def work(clients: Clients) -> None:
        clients.stubs[0].current = replace(NO_STATS, num_running=2, step_s=0.5)
        clients.stubs[1].current = replace(NO_STATS, num_running=3, num_blocks=7)
        assert await clients.engine.stats() == replace(NO_STATS, num_running=5, num_blocks=7, step_s=0.5)

    with_clients(work)


def test_an_adapter_is_loaded_on_all_replicas_or_on_none() -> None:
    async def work(clients: Clients) -> None:
        first, second = clients.stubs
        await clients.engine.load_adapter("good", "/good")
        assert first.loaded == second.loaded == {"good": "/good"}
        second.adapter_error = UserError("the adapter does not fit")
        with pytest.raises(UserError, match="does not fit"):
            await clients.engine.load_adapter("bad", "/bad")
        assert clients.engine.adapters == list(first.loaded) == ["good"]
        await clients.engine.unload_adapter("good")
        assert first.loaded == second.loaded == {}
        with pytest.raises(UserError, match="the adapter 'good' is not loaded: expected one of none"):
            await clients.engine.unload_adapter("good")

    with_clients(work)


def test_closing_closes_all() -> None:
    async def work(clients: Clients) -> None:
        await clients.engine.close(7.0)
        assert [stub.closed_s for stub in clients.stubs] == [7.0, 7.0]

    with_clients(work)
