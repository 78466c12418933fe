"""Replicas on Ray: what they say to their server, and with the marker `ray` a cluster of two nodes that loses one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from stub_replica import StubReplica, asked

from openbook.core.errors import UserError
from openbook.engine.client import EngineDownError
from openbook.engine.engine import EngineSettings
from openbook.engine.events import SequenceEvent
from openbook.engine.request import Request, SamplingParams
from openbook.engine.start import LoadOptions, start_engine
from openbook.engine.wire import Cancel, Events, Launch, Submit, decode_from_worker, encode
from openbook.server import ray_replicas
from openbook.server.ray_replicas import EngineReplica, RayEngine, RayLink, largest_share, start_ray_engines

SETTINGS = EngineSettings(cache_bytes=64 << 20)
LONG = SamplingParams(max_tokens=200, ignore_eos=True)


class Handle:
    """Calls a replica in this process as a handle of Serve calls one elsewhere; `is_gone` ends it."""

    def __init__(self, replica: EngineReplica) -> None:
        self.replica, self.is_gone = replica, False

    def options(self, stream: bool) -> Handle:
        assert stream
        return self

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.replica, name)

        class Method:
            @staticmethod
            def remote(*arguments: Any) -> Any:
                return self._stream(method(*arguments)) if name == "listen" else method(*arguments)

        return Method

    def _stream(self, items: AsyncIterator[list[bytes]]) -> Any:
        class Stream:
            def __aiter__(stream) -> Any:  # noqa: N805
                return stream

            async def __anext__(stream) -> list[bytes]:  # noqa: N805
                if self.is_gone:
                    raise RuntimeError("the actor died")
                return await anext(items)

            def cancel(stream) -> None:  # noqa: N805
                self.is_gone = True

        return Stream()


def replica_of(stub: StubReplica) -> EngineReplica:
    """A replica that has loaded a stub."""

    class Started:
        engine, profile = stub, "exact"

    replica = EngineReplica(encode(Launch("nano", LoadOptions(), SETTINGS, 1)), "application", 60.0)

    async def load() -> Any:
        return Started

    replica._loading = asyncio.get_running_loop().create_task(load())
    return replica


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 20))  # type: ignore[arg-type]


def test_an_engine_over_a_replica_answers_cancels_and_ends() -> None:
    async def work() -> None:
        stub = StubReplica()
        handle: Any = Handle(replica_of(stub))
        engine = RayEngine("replica 1 on Ray", "application", handle, RayLink(handle, await handle.start.remote()))
        assert (engine.max_model_len, engine.num_blocks) == (512, 0)

        async def collect(name: str) -> list[SequenceEvent]:
            return [event async for event in engine.submit(asked(name, [1]))]

        tasks = [asyncio.create_task(collect(name)) for name in "ab"]
        await settle()
        for name in "ab":
            stub.say(name, ord(name), is_last=True)
        assert [[event.token_ids for event in await task] for task in tasks] == [[[97]], [[98]]]
        left = asyncio.create_task(collect("left"))
        await settle()
        left.cancel()
        await settle()
        assert stub.cancelled == ["left"]
        lost = asyncio.create_task(collect("lost"))
        await settle()
        handle.is_gone = True
        engine._handle = Handle(replica_of(StubReplica()))
        stub.say("lost")  # what the stream was waiting for still comes, then it breaks
        assert [event.error for event in await lost] == [
            None,
            "replica 1 on Ray, which computed this answer, was lost (RuntimeError): send the request again",
        ]
        while not engine.is_up:
            await asyncio.sleep(0.001)
        assert engine.num_starts == 2
        engine.cut()
        await settle()

    run(work)


def test_messages_that_overtake_each_other_are_taken_in_order() -> None:
    async def work() -> None:
        stub = StubReplica()
        replica = replica_of(stub)
        stream = replica.listen("s")
        assert await anext(stream) == []
        await replica.deliver("s", 1, encode(Cancel(7)))
        await replica.deliver("s", 2, encode(Submit(8, asked("second", [1]))))
        await settle()
        assert stub.seen == []
        await replica.deliver("s", 0, encode(Submit(7, asked("first", [1]))))
        await settle()
        assert list(stub.queues) == ["second"]
        await replica.deliver("other", 3, encode(Cancel(8)))
        stub.say("second", 5, is_last=True)
        (message,) = await anext(stream)
        assert decode_from_worker(message) == Events(
            [(8, SequenceEvent(request_id="second", index=0, token_ids=[5], finish_reason="stop"))]
        )
        await stream.aclose()

    run(work)


def test_a_new_session_cancels_what_an_old_one_asked_for() -> None:
    async def work() -> None:
        stub = StubReplica()
        replica = replica_of(stub)
        old, new = replica.listen("old"), replica.listen("new")
        await anext(old)
        await replica.deliver("old", 0, encode(Submit(1, asked("a", [1]))))
        await settle()
        await anext(new)
        await settle()
        assert stub.cancelled == ["a"]
        await replica.deliver("new", 0, encode(Submit(1, asked("b", [1]))))
        await settle()
        await old.aclose()  # its end, noticed late, is not that of the new one
        await settle()
        assert list(stub.queues) == ["b"]
        await new.aclose()
        await settle()
        assert stub.cancelled == ["a", "b"]

    run(work)


def test_a_replica_that_cannot_load_says_why_and_tries_again_when_asked() -> None:
    async def work() -> None:
        replica = EngineReplica(encode(Launch("nanoo", LoadOptions(), SETTINGS, 1)), "application", 60.0)
        for _ in range(2):
            with pytest.raises(UserError, match="unknown model 'nanoo'"):
                RayLink(None, await replica.start())  # type: ignore[arg-type]

    run(work)


@pytest.mark.parametrize(
    ("nodes", "num_parts", "share"), [([4, 2], 2, 2), ([4, 2], 1, 4), ([4, 2], 3, 2), ([8, 1], 5, 1), ([0, 7], 2, 3)]
)
def test_cores_are_shared_without_splitting_over_nodes(nodes: list[int], num_parts: int, share: int) -> None:
    assert largest_share(nodes, num_parts) == share


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'pip install "openbook\[ray\]"'):
        start_ray_engines("nano", LoadOptions(), SETTINGS, 2)


NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each, on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    cluster.add_node(**NODE)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


async def collect(engine: Any, asked: Request) -> list[SequenceEvent]:
    return [event async for event in engine.submit(asked)]


def request(name: str, params: SamplingParams = LONG) -> Request:
    return Request(prompt_ids=[100 + ord(letter) for letter in name], params=params, id=name)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_replicas_on_a_cluster_of_two_nodes(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    (second_node,) = cluster.worker_nodes
    started = start_ray_engines("nano", LoadOptions(), SETTINGS, 2, cluster.address)
    engine = started.engine
    assert (started.name, started.profile, engine.max_model_len) == ("nano", "exact", 512)

    async def locally(requests: list[Request]) -> list[list[SequenceEvent]]:
        local = start_engine("nano", LoadOptions(), SETTINGS).engine
        answers = await asyncio.gather(*(collect(local, one) for one in requests))
        await local.close(0)
        return answers

    sampled = SamplingParams(max_tokens=40, temperature=1.0, seed=3, num_logprobs=2)
    requests = [request(f"{n}", sampled) for n in range(12)]
    expected = asyncio.run(locally(requests))

    async def work() -> None:
        assert await asyncio.gather(*(collect(engine, one) for one in requests)) == expected
        assert min([(await replica.stats()).num_steps for replica in engine.replicas]) > 0
        with pytest.raises(UserError, match="the prompt is empty"):
            await collect(engine, Request(prompt_ids=[], params=LONG, id="x"))
        prefix = [200 + n % 50 for n in range(160)]
        for n in range(4):
            asked = Request(prompt_ids=[*prefix, n], params=SamplingParams(max_tokens=1), id=str(n))
            assert (await collect(engine, asked))[-1].cached_tokens == (160 if n else 0)
        async with aclosing(engine.submit(request("leaves"))) as events:
            await anext(events)
        while (await engine.stats()).num_running:
            await asyncio.sleep(0.01)
        stats = await engine.stats()
        assert stats.num_free_blocks == stats.num_blocks > 0

        # A node goes away, with a replica and its answers.
        longer = SamplingParams(max_tokens=500, ignore_eos=True)
        tasks = {f"long {n}": asyncio.create_task(collect(engine, request(f"long {n}", longer))) for n in range(8)}
        while (await engine.stats()).num_running < 8:
            await asyncio.sleep(0)
        await asyncio.to_thread(cluster.remove_node, second_node, allow_graceful=False)
        answers = {name: await task for name, task in tasks.items()}
        reasons = sorted(str(events[-1].finish_reason) for events in answers.values())
        assert reasons == ["error"] * 4 + ["length"] * 4
        errors = {events[-1].error for events in answers.values()} - {None}
        assert all("which computed this answer, was lost" in str(error) for error in errors)
        assert [replica.is_up for replica in engine.replicas].count(True) == 1
        assert len(await collect(engine, request("after"))) == 200
        cluster.add_node(**NODE)  # from the main thread only
        while not all(replica.is_up for replica in engine.replicas):
            await asyncio.sleep(0.1)
        assert await asyncio.gather(*(collect(engine, one) for one in requests)) == expected

        tasks = {name: asyncio.create_task(collect(engine, request(name))) for name in ("c", "d")}
        while (await engine.stats()).num_running < 2:
            await asyncio.sleep(0)
        await engine.close(30.0)
        assert [len(await task) for task in tasks.values()] == [200, 200]
        assert serve.status().applications == {}
        with pytest.raises(EngineDownError, match="no engine is up"):
            await collect(engine, request("late"))

    asyncio.run(asyncio.wait_for(work(), 240))
    with pytest.raises(UserError, match=r"9 replicas need 9 cores and the Ray cluster at .* has \d: ask for fewer"):
        start_ray_engines("nano", LoadOptions(), SETTINGS, 9, cluster.address)
    monkeypatch.setattr(ray_replicas, "_PLACE_S", 3.0)
    monkeypatch.setattr(ray_replicas, "_cores_each", lambda num_replicas, address: 2)  # as if nodes had left
    with pytest.raises(UserError, match=r"1 of 1 replicas of 2 cores found no place on the cluster.*: ask for fewer"):
        start_ray_engines("nano", LoadOptions(), SETTINGS, 1, cluster.address)
    monkeypatch.undo()
    with pytest.raises(UserError, match="one block of 16 tokens takes"):
        start_ray_engines("nano", LoadOptions(), EngineSettings(cache_bytes=1), 1, cluster.address)
    assert serve.status().applications == {}


SERVER = """
import time
from openbook.engine.engine import EngineSettings
from openbook.engine.start import LoadOptions
from openbook.server import ray_replicas

ray_replicas._PULSE_S, ray_replicas._PATIENCE_S = 0.5, 3.0
started = ray_replicas.start_ray_engines("nano", LoadOptions(), EngineSettings(), 1, ADDRESS)
time.sleep(5.0)  # longer than a replica's patience
print("started", flush=True)
time.sleep(600)
"""


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
def test_replicas_of_a_server_that_dies_delete_themselves(cluster: Any) -> None:
    import ray
    from ray import serve

    program = SERVER.replace("ADDRESS", repr(cluster.address))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "started\n"
        ray.init(address=cluster.address, log_to_driver=False, ignore_reinit_error=True)
        applications = serve.status().applications
        assert [application.status for application in applications.values()] == ["RUNNING"]
        server.send_signal(signal.SIGKILL)
    end_s = time.monotonic() + 60
    while serve.status().applications and time.monotonic() < end_s:
        time.sleep(0.2)
    assert serve.status().applications == {}


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
def test_no_cluster_is_one_line() -> None:
    import ray

    ray.shutdown()  # of what tests before this one had
    with pytest.raises(
        UserError, match=r"there is no Ray cluster at '127.0.0.1:1' .*: start one with `ray start --head`"
    ):
        start_ray_engines("nano", LoadOptions(), SETTINGS, 1, "127.0.0.1:1")
