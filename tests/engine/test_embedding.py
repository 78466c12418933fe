"""Embeddings: those of Transformers, the same bits in any company, between the steps of answers that go on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_setup import make_engine, tokens
from numpy.typing import NDArray
from stub_replica import StubReplica
from transformers import AutoModel

from openbook.core.errors import UserError
from openbook.engine.client import EngineDownError, EngineFullError
from openbook.engine.embedding import EmbeddingJob
from openbook.engine.engine import Engine, EngineSettings
from openbook.engine.local_engine import LocalEngine
from openbook.engine.native_paged import NativePagedCache
from openbook.engine.paged import PagedStep
from openbook.engine.request import Request, SamplingParams
from openbook.engine.router import RoutedEngine
from openbook.engine.start import LoadOptions, StartedEngine, start_engine
from openbook.engine.start_many import start_engines
from openbook.ops.native_module import has_native
from peft_folders import merge, save_adapter

pytestmark = pytest.mark.skipif(not has_native(), reason="needs the native core")

LENGTHS = (1, 2, 15, 16, 17, 40, 150)
PROMPTS = [np.random.default_rng(length).integers(0, 274, length).tolist() for length in LENGTHS]


def embed(engine: Engine, *jobs: EmbeddingJob) -> list[NDArray[np.float32]]:
    """What each job gives, stepped until nothing is left."""
    for job in jobs:
        engine.embed(job)
    while engine.has_work:
        engine.step()
    assert all(job.is_over for job in jobs)
    found = [job.result for job in jobs]
    return [result for result in found if result is not None]


def job(*prompts: Sequence[int]) -> EmbeddingJob:
    return EmbeddingJob(list(prompts))


def bits(vectors: NDArray[np.float32]) -> list[bytes]:
    return [vector.tobytes() for vector in vectors]


def with_local(engine: Engine, work: Callable[[LocalEngine], Any]) -> Any:
    async def go() -> Any:
        local = LocalEngine(engine)
        try:
            return await asyncio.wait_for(work(local), 60)
        finally:
            await local.close(0)

    return asyncio.run(go())


def reference(folder: Path) -> NDArray[np.float32]:
    """The mean of Transformers' last hidden states for each prompt."""
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        rows = [model(torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in PROMPTS]
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_they_are_the_mean_of_transformers_hidden_states(tiny_folder: Path, profile: Any) -> None:
    started = start_engine(str(tiny_folder), LoadOptions(profile=profile), EngineSettings(cache_bytes=1 << 20))
    [found] = embed(started.engine.engine, job(*PROMPTS))
    assert started.profile == profile and found.dtype == np.float32
    expected = reference(tiny_folder)
    assert np.abs(found - expected).max() < 1e-5 < np.abs(expected).max()


def test_the_rows_that_logits_are_made_from_also_with_a_cache_of_8_bits(tiny_folder: Path) -> None:
    """`lm_head` of nano: its embedding."""
    from safetensors.numpy import load_file

    import openbook

    nano = Path(openbook.__file__).parent / "releases" / "nano"
    embedding = load_file(nano / "model.safetensors")["model.embed_tokens.weight"].astype(np.float32)
    options = LoadOptions(cache="int8")
    runner = start_engine("nano", options, EngineSettings(cache_bytes=1 << 20)).engine.engine._runner
    count = 20
    step = PagedStep(
        token_ids=np.arange(count, dtype=np.int32),
        positions=np.arange(count, dtype=np.int32),
        sequences=np.zeros(count, np.int32),
        block_tables=np.arange(2, dtype=np.int32)[None],
        wanted=np.array([3, 7, 19], np.int32),
    )
    hidden, logits = (getattr(runner.paged_cache(2), name)(step) for name in ("hidden_states", "forward"))
    assert hidden.shape == (3, embedding.shape[1])
    np.testing.assert_allclose(hidden @ embedding.T, logits, atol=1e-3)


@pytest.mark.parametrize("piece", [1, 7, 16, 64, 1000])
def test_company_order_and_pieces_change_no_bit(tiny_folder: Path, piece: int) -> None:
    alone = [bits(embed(make_engine(tiny_folder, max_step_tokens=1000), job(prompt))[0])[0] for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    engine = make_engine(tiny_folder, max_step_tokens=piece)
    engine.add(engine.prepare(Request(prompt_ids=PROMPTS[-1][:50], params=SamplingParams(max_tokens=60), id="x")))
    forwards, backwards, few = embed(engine, job(*PROMPTS), job(*PROMPTS[::-1]), job(*PROMPTS[2:4]))
    assert bits(forwards) == alone
    assert bits(backwards) == alone[::-1]
    assert bits(few) == alone[2:4]


def test_answers_go_on_meanwhile(tiny_folder: Path) -> None:
    """A step takes a piece and a token of the answer."""
    engine = make_engine(tiny_folder, max_step_tokens=32)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    alone = make_engine(tiny_folder)
    alone.add(alone.prepare(Request(prompt_ids=[1, 2, 3], params=params, id="x")))
    expected = [token for _ in range(40) for token in tokens(alone.step())]
    engine.add(engine.prepare(Request(prompt_ids=[1, 2, 3], params=params, id="x")))
    long = job(*[[5] * 150] * 20)
    engine.embed(long)
    assert [token for _ in range(40) for token in tokens(engine.step())] == expected
    assert 0 < long.num_done < 20
    assert 0 < engine.stats().num_prompt_tokens <= 40 * 32 + 3


def test_a_small_job_does_not_wait_for_a_large_one(tiny_folder: Path) -> None:
    engine = make_engine(tiny_folder, max_step_tokens=64)
    large, small = job(*[[5] * 60] * 50), job([7, 8])
    for one in (large, small):
        engine.embed(one)
    for _ in range(3):
        engine.step()
    assert small.is_over and large.num_done < 5


def test_short_texts_share_a_piece(tiny_folder: Path) -> None:
    engine = make_engine(tiny_folder, max_step_tokens=64)
    short = job(*[[5, 6, 7]] * 20)
    engine.embed(short)
    engine.step()
    assert short.is_over


def test_a_job_that_fails_harms_no_other(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner throws on one token: its text fails, the others of the same piece do not."""
    honest = NativePagedCache.hidden_states

    def hidden_states(cache: NativePagedCache, step: PagedStep) -> NDArray[np.float32]:
        if 13 in step.token_ids:
            raise RuntimeError("no 13")
        return honest(cache, step)

    monkeypatch.setattr(NativePagedCache, "hidden_states", hidden_states)
    engine = make_engine(tiny_folder)
    good, bad, also_good = job([1, 2], [3]), job([4], [13]), job([5, 6])
    embed(engine, good, bad, also_good)
    assert isinstance(bad.error, RuntimeError) and bad.result is None
    assert bits(good.result) == bits(embed(make_engine(tiny_folder), job([1, 2], [3]))[0])  # type: ignore[arg-type]
    assert also_good.error is None


def test_who_leaves_is_forgotten(tiny_folder: Path) -> None:
    engine = make_engine(tiny_folder, max_step_tokens=16)

    async def work(local: LocalEngine) -> None:
        task = asyncio.create_task(local.embed([[5] * 150] * 2000))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        deadline_s = time.monotonic() + 5
        while engine.has_work:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.005)
        assert engine.stats().num_prompt_tokens < 2000 * 150
        assert (await local.embed([[1], [2]])).shape == (2, 32)

    with_local(engine, work)


def test_the_queue_and_the_end(tiny_folder: Path) -> None:
    async def work(local: LocalEngine) -> None:
        waiting = [asyncio.create_task(local.embed([[5] * 150] * 2000)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(EngineFullError, match="2 requests are waiting"):
            await local.embed([[1]])
        await local.close(0.01)
        for task in waiting:
            with pytest.raises(EngineDownError, match="the engine is closed: try again in 5 s"):
                await task
        with pytest.raises(EngineFullError):
            await local.embed([[1]])

    with_local(make_engine(tiny_folder, max_waiting=2, max_step_tokens=16), work)


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        ([], "there is nothing to embed: give at least one text"),
        ([[1], []], "text 2 has 0 tokens: expected 1 to 160, the model's context; give some text"),
        ([[1] * 161], "text 1 has 161 tokens: expected 1 to 160, the model's context; shorten it"),
        ([[273, 274]], "text 1 has token ids from 273 to 274: expected 0 to 273; use this model's tokenizer"),
        ([[-1]], "text 1 has token ids from -1 to -1: expected 0 to 273; use this model's tokenizer"),
    ],
)
def test_what_is_refused(tiny_folder: Path, prompts: list[list[int]], text: str) -> None:
    async def work(local: LocalEngine) -> None:
        with pytest.raises(UserError) as caught:
            await local.embed(prompts)
        assert str(caught.value) == text
        with pytest.raises(UserError, match="the adapter 'x' is not loaded"):
            await local.embed([[1]], "x")

    with_local(make_engine(tiny_folder), work)


@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_with_an_adapter(tiny_folder: Path, tmp_path: Path, profile: Any) -> None:
    adapter = save_adapter(tmp_path / "adapter", tiny_folder)

    def start(folder: Path) -> StartedEngine:
        return start_engine(str(folder), LoadOptions(profile=profile), EngineSettings(cache_bytes=1 << 20))

    async def work(started: StartedEngine, name: str | None) -> NDArray[np.float32]:
        try:
            if name is not None:
                await started.engine.load_adapter(name, str(adapter))
            both = await asyncio.gather(started.engine.embed(PROMPTS, name), started.engine.embed(PROMPTS))
            if name is not None:
                assert np.abs(both[0] - both[1]).max() > 1e-3
                await started.engine.unload_adapter(name)
            return both[0]
        finally:
            await started.engine.close(0)

    merged = merge(tiny_folder, adapter, tmp_path / "merged")
    np.testing.assert_allclose(
        asyncio.run(work(start(tiny_folder), "tone")), asyncio.run(work(start(merged), None)), atol=1e-5
    )


def test_the_same_bits_from_a_process_of_its_own() -> None:
    settings = EngineSettings(cache_bytes=8 << 20)
    started = start_engines("nano", LoadOptions(), settings, num_workers=1, num_threads=1)

    async def work() -> None:
        local = start_engine("nano", LoadOptions(), settings).engine
        try:
            expected, found = await asyncio.gather(local.embed(PROMPTS), started.engine.embed(PROMPTS))
            assert bits(found) == bits(expected)
            with pytest.raises(UserError, match="text 1 has 0 tokens"):
                await started.engine.embed([[]])
            with pytest.raises(UserError, match="cannot be passed on"):
                await started.engine.embed([[2**70]])
            task = asyncio.create_task(started.engine.embed([[5] * 500] * 2000))
            await asyncio.sleep(0.1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            began_s = time.monotonic()
            await started.engine.close(20)
            assert time.monotonic() - began_s < 10  # the work was given up
        finally:
            await local.close(0)
            await started.engine.close(0)

    asyncio.run(work())


class EmbeddingReplica(StubReplica):
    """A replica that embeds, or raises what a test wants."""

    def __init__(self, *refusals: Exception) -> None:
        super().__init__()
        self.refusals, self.num_asked = list(refusals), 0
        self.gate = asyncio.Event()

    async def embed(self, prompts: Sequence[Sequence[int]], adapter: str | None = None) -> NDArray[np.float32]:
        self.num_asked += 1
        if self.refusals:
            raise self.refusals.pop(0)
        await self.gate.wait()
        return np.full((len(prompts), 1), len(prompts), np.float32)


def test_of_several_engines_the_least_busy_one_embeds() -> None:
    async def work() -> None:
        first, second = EmbeddingReplica(), EmbeddingReplica()
        engine = RoutedEngine([first, second])
        long = asyncio.create_task(engine.embed([[1] * 500] * 4))  # as much work as 15 sequences
        await asyncio.sleep(0)
        short = [asyncio.create_task(engine.embed([[1]])) for _ in range(4)]
        await asyncio.sleep(0)
        assert sorted((first.num_asked, second.num_asked)) == [1, 4]
        for replica in (first, second):
            replica.gate.set()
        assert [len(found) for found in await asyncio.gather(long, *short)] == [4, 1, 1, 1, 1]

    asyncio.run(work())


def test_an_engine_that_refuses_or_ends_is_passed_over() -> None:
    async def work() -> None:
        down, full = EngineDownError("it has ended", 1), EngineFullError(3, 9)
        replicas = [EmbeddingReplica(down, full), EmbeddingReplica()]
        replicas[1].gate.set()
        engine = RoutedEngine(replicas)
        for _ in range(2):
            assert (await engine.embed([[1], [2]])).shape == (2, 1)
        assert [replica.num_asked for replica in replicas] == [2, 2]
        both = RoutedEngine([EmbeddingReplica(down), EmbeddingReplica(down), EmbeddingReplica()])
        with pytest.raises(EngineDownError, match="it has ended"):
            await both.embed([[1]])
        with pytest.raises(EngineFullError, match="3 requests are waiting"):
            await RoutedEngine([EmbeddingReplica(full)]).embed([[1]])

    asyncio.run(work())
