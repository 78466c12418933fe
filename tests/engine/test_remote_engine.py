"""An engine behind a link: messages both ways, errors, and what happens when the other end is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stub_replica import StubReplica, asked, full

from openbook.core.errors import UserError
from openbook.engine import remote_engine
from openbook.engine.client import EngineDownError, EngineFullError
from openbook.engine.engine import EngineSettings
from openbook.engine.events import SequenceEvent, TokenLogprob
from openbook.engine.remote_engine import NO_STATS, LinkLostError, RemoteEngine
from openbook.engine.request import Constraint, Request, SamplingParams
from openbook.engine.start import LoadOptions
from openbook.engine.transcript import Piece
from openbook.engine.wire import (
    Events,
    Launch,
    Ready,
    Submit,
    WorkerBugError,
    decode_from_worker,
    decode_to_worker,
    encode,
)
from openbook.engine.worker import MessageServer
from openbook.tokenizer.images import ImagePatches
from openbook.tokenizer.tools import ToolCall

READY = Ready("exact", 512, 64, [])


class LoopLink:
    """A link to a stub in the same event loop."""

    def __init__(self, ready: Ready = READY) -> None:
        self.ready, self.stub = ready, StubReplica()
        self.messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.num_messages = 0
        self.server: MessageServer | None = None
        self.reason = "was cut"

    def send(self, data: bytes) -> None:
        if self.server is None:
            self.server = MessageServer(self.stub, self._say)
        self.server.receive(decode_to_worker(data))

    def _say(self, data: bytes) -> None:
        self.num_messages += 1
        self.messages.put_nowait(data)

    async def receive(self) -> bytes:
        data = await self.messages.get()
        if data is None:
            raise LinkLostError(self.reason)
        return data

    def lose(self, reason: str) -> None:
        self.reason = reason
        self.messages.put_nowait(None)

    def cut(self) -> None:
        self.lose("was cut")


class LoopEngine(RemoteEngine):
    """What it is started again with are the entries of `coming`."""

    def __init__(self, link: LoopLink | None = None) -> None:
        self.links = [link or LoopLink()]
        self.coming: list[LoopLink | Exception] = []
        super().__init__("engine 1", self.links[0])

    async def _connect(self) -> LoopLink:
        following = self.coming.pop(0) if self.coming else LoopLink()
        if isinstance(following, Exception):
            raise following
        self.links.append(following)
        return following

    @property
    def stub(self) -> StubReplica:
        return self.links[-1].stub


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def collect(engine: RemoteEngine, request: Request) -> list[SequenceEvent]:
    return [event async for event in engine.submit(request)]


def with_engine(work: Callable[[LoopEngine], Awaitable[None]], engine: Callable[[], LoopEngine] = LoopEngine) -> None:
    async def go() -> None:
        remote = engine()
        await asyncio.wait_for(work(remote), 10)
        remote.cut()
        await settle()

    asyncio.run(go())


def test_every_kind_of_message_comes_out_as_it_went_in() -> None:
    image = ImagePatches(np.arange(6, dtype=np.float32).reshape(2, 3), (1, 2), 1)
    params = SamplingParams(
        temperature=0.1,
        seed=2**64 - 1,
        logit_bias=((3, -1.5),),
        stop=("\n", "é"),
        constraint=Constraint(kind="regex", source="a+"),
    )
    request = Request(prompt_ids=[1, 2], params=params, images=[image], id="x", num_samples=3, tool_names=("f",))
    there = decode_to_worker(encode(Submit(7, request)))
    assert isinstance(there, Submit)
    assert there.request.images[0].patches.dtype == np.float32
    np.testing.assert_array_equal(there.request.images[0].patches, image.patches)
    assert replace(there.request, images=()) == replace(request, images=())

    launch = Launch("nano", LoadOptions(profile="exact"), EngineSettings(max_running=3), 2)
    assert decode_to_worker(encode(launch)) == launch
    event = SequenceEvent(
        request_id="x",
        index=1,
        token_ids=[4, 5],
        pieces=[Piece("reasoning", "ab\0"), Piece("answer", "\U0001f600")],
        tool_calls=[ToolCall(id="id", name="f", arguments="{}")],
        logprobs=[TokenLogprob(token_id=4, logprob=float("-inf"), top=[(1, -0.1)])],
        prompt_logprobs=[],
        finish_reason="stop",
    )
    assert decode_from_worker(encode(Events([(1, event)]))) == Events([(1, event)])


def test_the_events_of_one_step_travel_together() -> None:
    async def work(engine: LoopEngine) -> None:
        tasks = [asyncio.create_task(collect(engine, asked(str(n), [1], num_samples=2))) for n in range(8)]
        await settle()
        for is_last in (False, True):
            for n in range(8):
                for index in range(2):
                    engine.stub.say(str(n), 10 * n + index, is_last=is_last, index=index)
            await settle()
        answers = await asyncio.gather(*tasks)
        assert [[event.token_ids for event in events] for events in answers] == [
            [[10 * n], [10 * n + 1]] * 2 for n in range(8)
        ]
        assert engine.links[0].num_messages == 2

    with_engine(work)


def test_errors_keep_their_type_and_text() -> None:
    async def work(engine: LoopEngine) -> None:
        for error in (UserError("the prompt is empty: give some text"), full(), EngineFullError(1, 4)):
            engine.stub.refusal = error
            with pytest.raises(type(error)) as caught:
                await collect(engine, asked("a", [1]))
            assert str(caught.value) == str(error)
        assert isinstance(caught.value, EngineFullError) and caught.value.retry_after_s == 4
        engine.stub.adapter_error = UserError("the adapter does not fit")
        with pytest.raises(UserError, match="the adapter does not fit"):
            await engine.load_adapter("x", "/x")
        with pytest.raises(UserError, match="the adapter 'x' is not loaded"):
            await engine.unload_adapter("x")

    with_engine(work)


def test_a_bug_in_the_worker_is_logged_there_and_told_here(caplog: pytest.LogCaptureFixture) -> None:
    async def work(engine: LoopEngine) -> None:
        engine.stub.refusal = KeyError("lost")
        with pytest.raises(WorkerBugError, match="KeyError: 'lost'"):
            await collect(engine, asked("a", [1]))
        engine.stub.refusal = None
        task = asyncio.create_task(collect(engine, asked("b", [1], num_samples=2)))
        await settle()
        engine.stub.say("b", 1)
        await settle()
        engine.stub.fail("b", ZeroDivisionError("division by zero"))
        events = await task
        assert [(event.index, event.finish_reason, event.error) for event in events] == [
            (0, None, None),
            (0, "error", "ZeroDivisionError: division by zero"),
            (1, "error", "ZeroDivisionError: division by zero"),
        ]

    with_engine(work)
    assert "KeyError: 'lost'" in caplog.text


def test_what_no_message_can_hold_harms_its_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def work(engine: LoopEngine) -> None:
        for params in (SamplingParams(stop=("\ud800",)), SamplingParams(stop_ids=(2**70,))):
            with pytest.raises(UserError, match=r"the request cannot be passed on to its engine: .*; correct that"):
                await collect(engine, Request(prompt_ids=[1], params=params, id="a"))
        tasks = [asyncio.create_task(collect(engine, asked(name, [1]))) for name in ("good", "bad")]
        await settle()
        half = SequenceEvent(request_id="bad", index=0, pieces=[Piece("answer", "\udc80")])
        engine.stub.queues["bad"].put_nowait(half)
        engine.stub.say("good", 3, is_last=True)
        assert [event.token_ids for event in await tasks[0]] == [[3]]
        with pytest.raises(WorkerBugError, match="surrogates not allowed"):
            await tasks[1]
        await settle()
        assert engine.stub.cancelled == ["bad"]

    with_engine(work)


def test_a_reader_that_leaves_cancels_the_request_there() -> None:
    async def work(engine: LoopEngine) -> None:
        task = asyncio.create_task(collect(engine, asked("a", [1])))
        await settle()
        engine.stub.say("a")
        await settle()
        task.cancel()
        await settle()
        assert engine.stub.cancelled == ["a"]
        # Its name is free at once, and what is still on its way to the old one does not reach the new one.
        again = asyncio.create_task(collect(engine, asked("a", [1])))
        await settle()
        engine.stub.say("a", 9, is_last=True)
        assert [event.token_ids for event in await again] == [[9]]

    with_engine(work)


def test_a_lost_engine_ends_what_had_begun_and_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    async def work(engine: LoopEngine) -> None:
        tasks = {name: asyncio.create_task(collect(engine, asked(name, [1], num_samples=2))) for name in ("a", "b")}
        await settle()
        engine.stub.say("a", 1)
        engine.stub.say("a", 2, index=1, is_last=True)
        await settle()
        asking = asyncio.create_task(engine.load_adapter("x", "/x"))
        engine.coming = [UserError("there is too little memory"), LoopLink()]
        engine.links[0].lose("was killed by SIGKILL")
        events = await tasks["a"]
        assert [event.token_ids for event in events] == [[1], [2], []]
        assert (events[-1].index, events[-1].finish_reason) == (0, "error")
        assert events[-1].error == "engine 1, which computed this answer, was killed by SIGKILL: send the request again"
        with pytest.raises(EngineDownError, match="engine 1 was killed by SIGKILL: try again in 1 s"):
            await tasks["b"]
        with pytest.raises(EngineDownError, match="was killed"):
            await asking
        assert not engine.is_up
        with pytest.raises(EngineDownError, match="engine 1 is being started again: try again in 1 s"):
            await collect(engine, asked("c", [1]))
        await until_up(engine)
        assert engine.num_starts == 2
        again = asyncio.create_task(collect(engine, asked("a", [1])))
        await settle()
        engine.stub.say("a", is_last=True)
        assert len(await again) == 1

    with_engine(work)
    assert "engine 1 was killed by SIGKILL with 2 requests: it is started again" in caplog.text
    assert "engine 1 did not start: there is too little memory; the next try is in" in caplog.text


async def until_up(engine: RemoteEngine) -> None:
    while not engine.is_up:
        await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(remote_engine, "_FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(remote_engine, "_MOST_DELAY_S", 0.004)


def test_tries_to_start_again_come_at_growing_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(engine: LoopEngine) -> None:
        await engine.stats()
        engine.coming = [LinkLostError("ended with status 1")] * 4
        delays: list[float] = []
        real_sleep = asyncio.sleep

        async def sleep(delay_s: float) -> None:
            delays.append(delay_s)
            await real_sleep(0)

        monkeypatch.setattr(remote_engine.asyncio, "sleep", sleep)
        engine.links[0].lose("ended with status 1")
        while engine.num_starts == 1:
            await real_sleep(0)
        monkeypatch.undo()
        assert delays == [0.0, 0.001, 0.002, 0.004, 0.004]

    with_engine(work)


def test_what_is_no_message_ends_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    async def work(engine: LoopEngine) -> None:
        task = asyncio.create_task(collect(engine, asked("a", [1])))
        await settle()
        engine.links[0].messages.put_nowait(b"\xc1")
        with pytest.raises(EngineDownError, match="said something that is not understood"):
            await task
        await until_up(engine)

    with_engine(work)


def test_adapters_are_loaded_again(caplog: pytest.LogCaptureFixture) -> None:
    async def work(engine: LoopEngine) -> None:
        await engine.load_adapter("mine", "here")
        await engine.load_adapter("gone", "/gone")
        assert engine.stub.loaded == {"mine": str(Path("here").absolute()), "gone": "/gone"}
        assert engine.adapters == ["given", "mine", "gone"]

        class Forgetful(StubReplica):
            async def load_adapter(self, name: str, path: str) -> None:
                assert not engine.is_up  # no request comes before its adapter
                if name == "gone":
                    raise UserError("there is no folder /gone")
                await super().load_adapter(name, path)

        following = LoopLink(Ready("exact", 512, 64, ["given"]))
        following.stub = Forgetful()
        engine.coming = [following]
        engine.links[0].lose("was killed by SIGKILL")
        await settle()
        await until_up(engine)
        assert list(following.stub.loaded) == ["mine"]
        assert engine.adapters == ["given", "mine"]

    with_engine(work, lambda: LoopEngine(LoopLink(Ready("exact", 512, 64, ["given"]))))
    assert "engine 1 has lost the adapter gone: there is no folder /gone" in caplog.text


def test_counts_go_on_after_a_new_start() -> None:
    async def work(engine: LoopEngine) -> None:
        engine.stub.current = replace(NO_STATS, num_new_tokens=10, num_running=3, num_blocks=64)
        assert (await engine.stats()).num_running == 3
        following = LoopLink()
        following.stub.current = replace(NO_STATS, num_new_tokens=2, num_running=1, num_blocks=64)
        engine.coming = [LinkLostError("was killed")] * 3 + [following]
        engine.links[0].lose("was killed")
        await settle()
        assert await engine.stats() == replace(NO_STATS, num_new_tokens=10)
        await until_up(engine)
        assert await engine.stats() == replace(NO_STATS, num_new_tokens=12, num_running=1, num_blocks=64)

    with_engine(work)


def test_closing_while_it_is_down_starts_nothing_again() -> None:
    async def work(engine: LoopEngine) -> None:
        await engine.stats()
        engine.coming = [LinkLostError("was killed")] * 10_000
        engine.links[0].lose("was killed")
        await asyncio.sleep(0.01)
        await engine.close(5.0)
        num_left = len(engine.coming)
        await asyncio.sleep(0.02)
        assert len(engine.coming) == num_left
        with pytest.raises(EngineFullError):
            await collect(engine, asked("a", [1]))

    with_engine(work)
