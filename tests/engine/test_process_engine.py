"""Engines in processes of their own: the same answers, and no harm done when a process is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from openbook.checkpoint.locate import releases_dir
from openbook.core.errors import UserError
from openbook.engine.client import EngineClient, EngineDownError, EngineFullError
from openbook.engine.engine import EngineSettings
from openbook.engine.events import SequenceEvent
from openbook.engine.process_engine import ProcessEngine
from openbook.engine.request import Request, SamplingParams
from openbook.engine.router import RoutedEngine
from openbook.engine.start import LoadOptions, start_engine
from openbook.engine.start_many import divide, start_engines
from openbook.ops.native_module import has_native
from peft_folders import save_adapter

pytestmark = pytest.mark.skipif(not has_native(), reason="nano needs the native core to load fast")

SETTINGS = EngineSettings(cache_bytes=64 << 20, max_running=32)
NUM_TOKENS = 100  # of an answer that lasts
LONG = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
LONGER = SamplingParams(max_tokens=2 * NUM_TOKENS, ignore_eos=True)


def request(name: str, params: SamplingParams = LONG, **changes: object) -> Request:
    prompt_ids = [100 + ord(letter) for letter in name]
    return Request(prompt_ids=prompt_ids, params=params, id=name, **changes)  # type: ignore[arg-type]


async def collect(engine: EngineClient, asked: Request) -> list[SequenceEvent]:
    return [event async for event in engine.submit(asked)]


def token_ids(events: list[SequenceEvent], index: int = 0) -> list[int]:
    return [token_id for event in events if event.index == index for token_id in event.token_ids]


def with_workers(
    work: Callable[[RoutedEngine], Awaitable[None]], num_workers: int = 2, settings: EngineSettings = SETTINGS
) -> None:
    """Run `await work(engine)` on engines in processes; afterwards none of these is left."""
    started = start_engines("nano", LoadOptions(), settings, num_workers, num_threads=1)
    pids = [process.pid for process in processes(started.engine)]

    async def go() -> None:
        try:
            await asyncio.wait_for(work(started.engine), 60)
        finally:
            pids.extend(process.pid for process in processes(started.engine))
            await started.engine.close(0)

    asyncio.run(go())
    assert not [pid for pid in pids if is_alive(pid)]


def processes(engine: RoutedEngine) -> list[ProcessEngine]:
    found = [replica for replica in engine.replicas if isinstance(replica, ProcessEngine)]
    assert len(found) == len(engine.replicas)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"  # dead, and not waited for
    except FileNotFoundError:
        return False


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # `with_workers` has a limit
        await asyncio.sleep(0.005)


def test_the_same_answers_as_an_engine_in_this_process() -> None:
    kinds = [
        SamplingParams(max_tokens=30),
        SamplingParams(max_tokens=30, temperature=1.0, seed=5, top_p=0.9, num_logprobs=2, num_prompt_logprobs=1),
        SamplingParams(max_tokens=30, temperature=0.7, seed=2**64 - 1, stop=("1",), ignore_eos=True),
    ]
    requests = [request(f"{n} {kind}", params, num_samples=2) for kind, params in enumerate(kinds) for n in range(5)]

    async def ask_all(engine: EngineClient) -> list[list[SequenceEvent]]:
        return await asyncio.gather(*(collect(engine, one) for one in requests))

    async def locally() -> list[list[SequenceEvent]]:
        local = start_engine("nano", LoadOptions(), SETTINGS).engine
        try:
            return await ask_all(local)
        finally:
            await local.close(0)

    def by_sequence(events: list[SequenceEvent]) -> list[list[SequenceEvent]]:
        return [[event for event in events if event.index == index] for index in range(2)]

    expected = asyncio.run(locally())

    async def work(engine: RoutedEngine) -> None:
        found = await ask_all(engine)
        for ours, theirs in zip(map(by_sequence, found), map(by_sequence, expected), strict=True):
            assert ours == theirs  # bit for bit, logprobs included
        per_process = [(await process.stats()).num_new_tokens for process in processes(engine)]
        assert min(per_process) > 0
        assert sum(per_process) == sum(len(event.token_ids) for events in found for event in events)
        assert engine.max_model_len == 512

    with_workers(work)


def test_an_adapter_is_loaded_in_every_process_and_again_in_a_new_one(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", releases_dir() / "nano")
    asked = [request(f"{n}", adapter="mine") for n in range(4)]

    async def locally() -> list[list[SequenceEvent]]:
        local = start_engine("nano", LoadOptions(), SETTINGS).engine
        await local.load_adapter("mine", str(folder))
        answers = [await collect(local, one) for one in asked]
        plain = await collect(local, request("0"))
        assert token_ids(plain) != token_ids(answers[0])
        await local.close(0)
        return answers

    expected = asyncio.run(locally())

    async def work(engine: RoutedEngine) -> None:
        await engine.load_adapter("mine", str(folder))
        assert engine.adapters == ["mine"]
        with pytest.raises(UserError, match="mine"):
            await engine.load_adapter("mine", str(folder))
        first, second = processes(engine)
        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: not first.is_up)
        await until(lambda: first.is_up)
        for process in (first, second):
            assert [await collect(process, one) for one in asked] == expected
        await engine.unload_adapter("mine")
        assert first.adapters == second.adapters == engine.adapters == []
        with pytest.raises(UserError, match="the adapter 'mine' is not loaded"):
            await collect(engine, asked[0])

    with_workers(work)


def test_a_shared_prefix_is_computed_once() -> None:
    prefix = [200 + n % 50 for n in range(160)]

    async def work(engine: RoutedEngine) -> None:
        for n in range(6):
            asked = Request(prompt_ids=[*prefix, n], params=SamplingParams(max_tokens=1), id=str(n))
            assert (await collect(engine, asked))[-1].cached_tokens == (160 if n else 0)
        assert sorted([(await process.stats()).num_steps > 0 for process in processes(engine)]) == [False, True]

    with_workers(work)


def test_a_reader_that_leaves_frees_its_blocks() -> None:
    async def work(engine: RoutedEngine) -> None:
        async with aclosing(engine.submit(request("leaves"))) as events:  # type: ignore[type-var]
            await anext(events)
            assert (await engine.stats()).num_free_blocks < (await engine.stats()).num_blocks
        task = asyncio.create_task(collect(engine, request("is cancelled")))
        await asyncio.sleep(0.02)
        task.cancel()
        for _ in range(1000):
            stats = await engine.stats()
            if not stats.num_running:
                break
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks == stats.num_blocks > 0
        assert stats.num_new_tokens < 100
        assert len(token_ids(await collect(engine, request("leaves")))) == NUM_TOKENS

    with_workers(work, 1)


def test_wrong_requests_and_a_full_queue_are_refused_as_in_one_process() -> None:
    async def work(engine: RoutedEngine) -> None:
        for asked, text in [
            (Request(prompt_ids=[], params=LONG, id="x"), "the prompt is empty: expected at least one token"),
            (Request(prompt_ids=[10**6], params=LONG, id="x"), "prompt has token ids from 1000000 to 1000000"),
            (request("x", adapter="none"), "the adapter 'none' is not loaded"),
        ]:
            with pytest.raises(UserError, match=text):
                await collect(engine, asked)
        with pytest.raises(UserError, match="adapter"):
            await engine.load_adapter("none", "/no/such/folder")
        tasks = [asyncio.create_task(collect(engine, request(name))) for name in "abcd"]
        await asyncio.sleep(0)
        with pytest.raises(EngineFullError, match=r"\d+ requests are waiting: try again in \d+ s") as caught:
            await collect(engine, request("e"))
        assert caught.value.retry_after_s >= 1 and not isinstance(caught.value, EngineDownError)
        assert [len(token_ids(await task)) for task in tasks] == [NUM_TOKENS] * 4

    with_workers(work, settings=EngineSettings(cache_bytes=64 << 20, max_running=1, max_waiting=1))


def test_a_killed_process_harms_its_own_answers_only_and_comes_back() -> None:
    names = [f"request {n}" for n in range(20)]

    async def work(engine: RoutedEngine) -> None:
        killed, other = processes(engine)
        began = 0

        async def ask(name: str) -> list[SequenceEvent]:
            nonlocal began
            events = []
            async for event in engine.submit(request(name, LONGER)):
                began += not events
                events.append(event)
            return events

        tasks = {name: asyncio.create_task(ask(name)) for name in names}
        await until(lambda: began == 20)
        pid = killed.pid
        os.kill(pid, signal.SIGKILL)
        answers = {name: await task for name, task in tasks.items()}
        failed = {name for name, events in answers.items() if events[-1].finish_reason == "error"}
        assert 1 <= len(failed) <= 10  # half of them were there
        for name in failed:
            assert answers[name][-1].error == (
                "engine process 1, which computed this answer, was killed by SIGKILL: send the request again"
            )
        await until(lambda: killed.is_up)
        assert killed.pid != pid and killed.num_starts == 2
        again = await asyncio.gather(*(collect(killed, request(name, LONGER)) for name in names))
        for name, events in zip(names, again, strict=True):
            assert len(token_ids(events)) == 2 * NUM_TOKENS
            assert token_ids(answers[name]) == token_ids(events)[: len(token_ids(answers[name]))]
            assert name in failed or answers[name][-1].finish_reason == "length"
        assert other.num_starts == 1

    with_workers(work)


def test_requests_go_to_the_others_while_one_is_down_and_none_is_an_error() -> None:
    async def work(engine: RoutedEngine) -> None:
        first, second = processes(engine)
        await engine.stats()
        os.kill(first.pid, signal.SIGKILL)
        # Whether or not its end has been noticed, nothing is lost that had not begun.
        answers = await asyncio.gather(*(collect(engine, request(f"{n}")) for n in range(6)))
        assert [len(token_ids(events)) for events in answers] == [NUM_TOKENS] * 6
        await until(lambda: first.is_up)
        for process in (first, second):
            os.kill(process.pid, signal.SIGKILL)
        await until(lambda: not first.is_up and not second.is_up)
        with pytest.raises(EngineDownError, match="no engine is up: try again in 1 s"):
            await collect(engine, request("a"))
        assert (await engine.stats()).num_blocks == 0
        await until(lambda: second.is_up)
        assert len(token_ids(await collect(engine, request("a")))) == NUM_TOKENS

    with_workers(work)


def test_closing_lets_answers_finish_or_ends_them_at_the_deadline() -> None:
    async def close(deadline_s: float, num_tokens: int) -> list[list[SequenceEvent]]:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        engine = start_engines("nano", LoadOptions(), SETTINGS, 2, num_threads=1).engine
        tasks = [asyncio.create_task(collect(engine, request(f"{n}", params))) for n in range(8)]
        while (await engine.stats()).num_running < 8:
            pass
        closing = asyncio.create_task(engine.close(deadline_s))
        await until(lambda: not any(process.is_up for process in processes(engine)))
        with pytest.raises(EngineFullError):
            await collect(engine, request("late"))
        await asyncio.wait_for(closing, 30)
        assert not any(is_alive(process.pid) for process in processes(engine))
        return await asyncio.gather(*tasks)

    assert [len(token_ids(events)) for events in asyncio.run(close(30.0, NUM_TOKENS))] == [NUM_TOKENS] * 8
    assert [events[-1].finish_reason for events in asyncio.run(close(0.0, 500))] == ["cancelled"] * 8


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown model 'nanoo'"):
        start_engines("nanoo", LoadOptions(), SETTINGS, 2)
    with pytest.raises(UserError, match="give it more memory"):
        start_engines("nano", LoadOptions(), EngineSettings(cache_bytes=1), 2)
    with pytest.raises(UserError, match="the number of workers is 0: expected 1 or more"):
        start_engines("nano", LoadOptions(), SETTINGS, 0)
    with pytest.raises(UserError, match="the number of threads is 0: expected 1 or more"):
        start_engines("nano", LoadOptions(), SETTINGS, 1, num_threads=0)


def test_threads_are_divided() -> None:
    engine = start_engines("nano", LoadOptions(), SETTINGS, 2, num_threads=3).engine
    environments = [Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0") for process in processes(engine)]
    asyncio.run(engine.close(0))
    assert [b"OMP_NUM_THREADS=1" in environment for environment in environments] == [True, False]
    assert [b"OMP_NUM_THREADS=2" in environment for environment in environments] == [False, True]
    assert divide(3, 2) == [1, 2]
    assert divide(8, 3) == [2, 3, 3]
    assert divide(2, 4) == [1, 1, 1, 1]


PARENT = """
import asyncio
from openbook.engine.engine import EngineSettings
from openbook.engine.request import Request, SamplingParams
from openbook.engine.start import LoadOptions
from openbook.engine.start_many import start_engines

engine = start_engines("nano", LoadOptions(), EngineSettings(cache_bytes=64 << 20), 2, num_threads=1).engine
print(*(replica.pid for replica in engine.replicas), flush=True)

async def go():
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    while True:
        async for _ in engine.submit(Request(prompt_ids=[1], params=params, id="a")):
            pass

asyncio.run(go())
"""


@pytest.mark.parametrize("way", ["SIGKILL", "SIGINT"])
def test_no_process_outlives_its_parent(way: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(is_alive, pids))
    time.sleep(0.1)
    parent.send_signal(getattr(signal, way))
    parent.wait()
    parent.stdout.close()
    end_s = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < end_s:
        time.sleep(0.01)
    assert not any(map(is_alive, pids))
