"""The engine behind an event loop: many readers, cancelled readers, a full queue, an orderly end."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from engine_setup import make_engine, run, tokens

from openbook.core.errors import UserError
from openbook.engine.client import EngineFullError
from openbook.engine.engine import Engine
from openbook.engine.events import SequenceEvent
from openbook.engine.local_engine import LocalEngine
from openbook.engine.request import Constraint, Request, SamplingParams

LONG = SamplingParams(max_tokens=100, ignore_eos=True)


def request(name: str, params: SamplingParams = LONG, **changes: Any) -> Request:
    return Request(prompt_ids=[ord(letter) for letter in name], params=params, id=name, **changes)


async def collect(engine: LocalEngine, asked: Request) -> list[SequenceEvent]:
    return [event async for event in engine.submit(asked)]


def with_engine(engine: Engine, work: Any) -> Any:
    """Run `await work(local)` on a local engine, and close it."""

    async def go() -> Any:
        local = LocalEngine(engine)
        try:
            return await asyncio.wait_for(work(local), 60)
        finally:
            await local.close(5)

    return asyncio.run(go())


async def until(holds: Any) -> None:
    for _ in range(2000):
        if holds():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("waited in vain")


def test_many_readers_get_their_own_answers(tiny_folder: Path) -> None:
    names = [f"request {number}" for number in range(30)]

    async def work(local: LocalEngine) -> list[list[SequenceEvent]]:
        return await asyncio.gather(*(collect(local, request(name, num_samples=2)) for name in names))

    found = with_engine(make_engine(tiny_folder), work)
    alone = make_engine(tiny_folder)
    for name, events in zip(names, found, strict=True):
        assert {event.request_id for event in events} == {name}
        expected = run(alone, [request(name, num_samples=2)])
        for index in range(2):
            assert tokens(event for event in events if event.index == index) == tokens(expected[name, index])


def test_a_reader_that_leaves_frees_its_blocks(tiny_folder: Path) -> None:
    engine = make_engine(tiny_folder)

    async def work(local: LocalEngine) -> None:
        stays = asyncio.create_task(collect(local, request("stays")))
        async with aclosing(local.submit(request("leaves"))) as events:
            async for _ in events:
                break
        task = asyncio.create_task(collect(local, request("is cancelled")))
        await asyncio.sleep(0.01)
        task.cancel()
        await until(lambda: engine.stats().num_running <= 1)
        assert len(tokens(await stays)) == 100
        assert engine.stats().num_free_blocks == engine.stats().num_blocks
        assert len(tokens(await collect(local, request("leaves")))) == 100  # its name is free again

    with_engine(engine, work)


def test_a_full_queue_turns_requests_away(tiny_folder: Path) -> None:
    async def work(local: LocalEngine) -> None:
        tasks = [asyncio.create_task(collect(local, request(name))) for name in "abc"]
        await asyncio.sleep(0)
        with pytest.raises(EngineFullError) as caught:
            await collect(local, request("d"))
        assert 1 <= caught.value.retry_after_s <= 60
        assert [len(tokens(events)) for events in await asyncio.gather(*tasks)] == [100] * 3
        assert len(tokens(await collect(local, request("d")))) == 100

    with_engine(make_engine(tiny_folder, max_running=1, max_waiting=2), work)


def test_wrong_requests_are_refused_before_they_run(tiny_folder: Path) -> None:
    async def work(local: LocalEngine) -> None:
        for asked, text in [
            (Request(prompt_ids=[], params=LONG, id="x"), "the prompt is empty"),
            (request("x", adapter="none"), "the adapter 'none' is not loaded"),
            (request("x", SamplingParams(constraint=Constraint(kind="regex", source="("))), "regex"),
        ]:
            with pytest.raises(UserError, match=text):
                await collect(local, asked)
        with pytest.raises(UserError, match="this model takes no adapters"):
            await local.load_adapter("a", "somewhere")
        with pytest.raises(UserError, match="the adapter 'a' is not loaded: expected one of none"):
            await local.unload_adapter("a")
        task = asyncio.create_task(collect(local, request("twice")))
        await asyncio.sleep(0)
        with pytest.raises(UserError, match="a request with the id 'twice' is running: give each its own"):
            await collect(local, request("twice"))
        await task

    with_engine(make_engine(tiny_folder), work)


def test_closing_lets_what_runs_finish(tiny_folder: Path) -> None:
    async def work(local: LocalEngine) -> None:
        task = asyncio.create_task(collect(local, request("runs")))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(local.close(30))
        await asyncio.sleep(0)
        with pytest.raises(EngineFullError):
            await collect(local, request("comes late"))
        await closing
        events = await task
        assert (len(tokens(events)), events[-1].finish_reason) == (100, "length")

    with_engine(make_engine(tiny_folder), work)


def test_closing_at_once_ends_what_runs_cleanly(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tiny_folder)
    step = engine.step

    def slow_step() -> list[SequenceEvent]:
        import time

        time.sleep(0.02)
        return step()

    monkeypatch.setattr(engine, "step", slow_step)

    async def work(local: LocalEngine) -> None:
        task = asyncio.create_task(collect(local, request("runs")))
        await asyncio.sleep(0.1)
        await local.close(0)
        events = await task
        assert 0 < len(tokens(events)) < 100
        assert events[-1].finish_reason == "cancelled"

    with_engine(engine, work)
