"""A draft model guesses: answers stay what they are, and its cache and reading stay within bounds."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from drafters import ANY_PRICE, GREEDY, WAYS, Eager, FixedCost, Said, guessing_engine, is_idle, plain, said, ways
from engine_setup import make_engine, run, runner_of, tokens
from numpy.typing import NDArray

from openbook.checkpoint.folder import save_model
from openbook.checkpoint.locate import locate
from openbook.checkpoint.model_source import open_model
from openbook.core.errors import UserError
from openbook.engine.choices import Profile
from openbook.engine.draft_model import ModelDrafter
from openbook.engine.drafting import NgramDrafter
from openbook.engine.engine import Drafter, Engine, EngineSettings
from openbook.engine.model import Model
from openbook.engine.native_load import load_native
from openbook.engine.native_runner import NativeRunner
from openbook.engine.paged import PagedRunner, PagedStep
from openbook.engine.request import Request, SamplingParams
from openbook.engine.sampler import probabilities
from openbook.engine.sequence_factory import SequenceFactory
from openbook.engine.start import LoadOptions, start_engine
from openbook.models.base import init_weights
from openbook.models.config import DecoderConfig
from openbook.models.registry import build_model
from openbook.ops.torch_ops import TorchOps
from openbook.tokenizer.chat import Chat, default_template
from openbook.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def other_folder(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model with the same tokens, random weights of its own and a context of 64."""
    folder = tmp_path_factory.mktemp("drafts") / "smaller"
    config = DecoderConfig(
        vocab_size=tiny_tokenizer.vocab_size + 6,  # some rows of no token
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = build_model(config, TorchOps())
    init_weights(model, 2)
    save_model(model, folder)
    Chat(tiny_tokenizer, default_template()).save(folder)
    return folder


def runner(folder: Path) -> NativeRunner:
    return load_native(open_model(folder))


def drafter(draft: PagedRunner, **changes: object) -> ModelDrafter:
    """One that takes its guesses to cost nothing."""
    made = ModelDrafter(draft, 274, **{"num_draft_tokens": 5, "num_blocks": 200, **changes})  # type: ignore[arg-type]
    made._guess_s = 0.0
    return made


def holds_nothing(one: ModelDrafter) -> bool:
    return not one._readings and one._blocks.num_free == one._blocks.num_blocks


@pytest.fixture(scope="module")
def expected(tiny_folder: Path) -> dict[tuple[str, int], Said]:
    return plain(tiny_folder, ways(24))


CROWDING: dict[str, dict[str, object]] = {
    "roomy": {"max_running": 32},
    "small steps": {"max_running": 4, "max_step_tokens": 9},
    "few blocks": {"max_running": 32, "num_blocks": 14},
}


@pytest.mark.parametrize("crowding", list(CROWDING))
@pytest.mark.parametrize("room", ["roomy", "few draft blocks", "slow reading"])
@pytest.mark.parametrize("draft", ["itself", "another"])
def test_a_draft_model_changes_nothing(
    tiny_folder: Path,
    other_folder: Path,
    expected: dict[tuple[str, int], Said],
    crowding: str,
    room: str,
    draft: str,
) -> None:
    limits = {"roomy": {}, "few draft blocks": {"num_blocks": 9}, "slow reading": {"max_step_tokens": 8}}[room]
    mine = drafter(runner(tiny_folder if draft == "itself" else other_folder), **limits)
    engine = guessing_engine(tiny_folder, Eager(mine), **CROWDING[crowding])  # type: ignore[arg-type]
    found = run(engine, ways(24))
    assert engine._drafter is not None, "the drafter failed"
    assert {key: said(events) for key, events in found.items()} == expected
    stats = engine.stats()
    assert is_idle(engine) and holds_nothing(mine)
    assert stats.num_draft_tokens > 100
    if draft == "itself":
        assert stats.num_accepted_tokens > 0.9 * stats.num_draft_tokens
    if "num_blocks" in CROWDING[crowding]:
        assert stats.num_preempted > 0


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("stops", "ends")])
def test_a_model_that_drafts_for_itself_is_always_right(tiny_folder: Path, way: str) -> None:
    """It draws with the sequence's own random numbers and penalties, from the same bits."""
    asked = [
        Request(prompt_ids=[3, 1, 4, index], params=replace(WAYS[way], seed=index), id=f"{index}", num_samples=2)
        for index in range(4)
    ]
    engine = guessing_engine(tiny_folder, Eager(drafter(runner(tiny_folder))))
    found = run(engine, asked)
    stats = engine.stats()
    assert stats.num_accepted_tokens == stats.num_draft_tokens
    # One token by itself, then 6 at a time.
    assert [len(event.token_ids) for event in found["0", 0]] == [1, 6, 6, 6, 6, 5]


def test_tokens_that_nobody_guessed_are_read_too() -> None:
    """Those that close the thinking when its budget is spent."""
    folder = locate("nano")
    prompt = Model.load("nano").prompt_ids("What is 48 plus 57? Give only the result.")
    asked = [Request(prompt_ids=prompt, params=replace(GREEDY, max_tokens=60, thinking_budget=9), id="a")]
    mine = ModelDrafter(runner(folder), 770, num_draft_tokens=5, num_blocks=40)
    engine = guessing_engine(folder, Eager(mine))
    assert said(run(engine, asked)["a", 0]) == plain(folder, asked)["a", 0]
    stats = engine.stats()
    # Only the guesses at what would have come instead are wrong.
    assert stats.num_draft_tokens - stats.num_accepted_tokens <= 5 < stats.num_accepted_tokens


@dataclass
class Watched:
    """A runner whose steps are kept."""

    inner: PagedRunner
    steps: list[PagedStep] = field(default_factory=list)

    profile: Profile = "exact"

    def __post_init__(self) -> None:
        self.max_model_len, self.vocab_size = self.inner.max_model_len, self.inner.vocab_size
        self.block_bytes = self.inner.block_bytes

    def paged_cache(self, num_blocks: int) -> Watched:
        self._cache = self.inner.paged_cache(num_blocks)
        return self

    def forward(self, step: PagedStep) -> NDArray[np.float32]:
        self.steps.append(step)
        return self._cache.forward(step)

    def copy(self, source: int, target: int) -> None:
        raise AssertionError("no block of a draft is shared while it is written")


def test_a_long_prompt_is_read_at_a_bounded_rate(tiny_folder: Path) -> None:
    watched = Watched(runner(tiny_folder))
    engine = guessing_engine(tiny_folder, Eager(drafter(watched, max_step_tokens=32)))
    long = Request(prompt_ids=list(range(100)), params=GREEDY, id="long")
    lengths = [len(event.token_ids) for event in run(engine, [long])["long", 0]]
    # 100 tokens are read in four steps, of which the first three guess nothing.
    assert lengths[:6] == [1, 1, 1, 1, 6, 6]
    assert max(len(step.token_ids) for step in watched.steps) == 32


def test_a_long_prompt_does_not_hold_up_other_guesses(tiny_folder: Path) -> None:
    engine = guessing_engine(tiny_folder, Eager(drafter(runner(tiny_folder), max_step_tokens=20)))
    short = Request(prompt_ids=[1, 2, 3], params=GREEDY, id="short")
    found = run(engine, [Request(prompt_ids=list(range(100)), params=GREEDY, id="long"), short])
    assert [len(event.token_ids) for event in found["short", 0]] == [1, 6, 6, 6, 6, 5]


def test_what_one_sequence_has_read_others_find(tiny_folder: Path) -> None:
    watched = Watched(runner(tiny_folder))
    engine = guessing_engine(tiny_folder, Eager(drafter(watched, max_step_tokens=64)))
    prompt = list(range(100))

    def num_read(request: Request) -> int:
        watched.steps.clear()
        run(engine, [request])
        return sum(len(step.token_ids) for step in watched.steps)

    first = num_read(Request(prompt_ids=prompt, params=GREEDY, id="first"))
    second = num_read(Request(prompt_ids=prompt, params=GREEDY, id="second"))
    assert first - second == 96
    # Samples wait for the one that reads their prompt, but for another that begins in its last piece.
    engine = guessing_engine(tiny_folder, Eager(drafter(watched, max_step_tokens=64)))
    params = replace(GREEDY, temperature=1.0)
    samples = num_read(Request(prompt_ids=prompt, params=params, id="samples", num_samples=4))
    assert samples <= 2 * first + 2 * second


def test_a_shorter_context_guesses_up_to_its_end(tiny_folder: Path, other_folder: Path) -> None:
    watched = Watched(runner(other_folder))
    mine = drafter(watched)
    engine = guessing_engine(tiny_folder, Eager(mine))
    asked = [
        Request(prompt_ids=list(range(length)), params=replace(GREEDY, max_tokens=40), id=f"{length}")
        for length in (40, 62, 63, 64, 65, 90)
    ]
    found = run(engine, asked)
    assert engine._drafter is not None
    assert {key: said(events) for key, events in found.items()} == plain(tiny_folder, asked)
    assert max(int(step.positions.max()) for step in watched.steps) == 63
    assert holds_nothing(mine)


def test_an_id_that_the_draft_model_lacks_is_not_given_to_it(tiny_folder: Path, other_folder: Path) -> None:
    watched = Watched(runner(tiny_folder))
    engine = guessing_engine(other_folder, Eager(ModelDrafter(watched, 280, num_draft_tokens=4, num_blocks=50)))
    asked = [
        Request(prompt_ids=[1, 277, 3], params=GREEDY, id="unknown"),
        Request(prompt_ids=[1, 7, 3], params=replace(GREEDY, logit_bias=((5, 9.0), (278, 1.0))), id="known"),
    ]
    found = run(engine, asked)
    assert {key: said(events) for key, events in found.items()} == plain(other_folder, asked)
    assert engine._drafter is not None
    assert max(int(step.token_ids.max()) for step in watched.steps) < 274
    assert engine.stats().num_draft_tokens > 0


def test_a_full_cache_guesses_for_those_it_has_room_for(tiny_folder: Path) -> None:
    mine = drafter(runner(tiny_folder), num_blocks=4)  # 64 tokens
    engine = guessing_engine(tiny_folder, Eager(mine))
    asked = [Request(prompt_ids=[index] * 40, params=GREEDY, id=f"{index}") for index in range(3)]
    found = run(engine, asked)
    first, *others = (events for (_, _), events in sorted(found.items()))
    assert len(first) < 12
    assert all(len(events) > 12 for events in others)
    assert holds_nothing(mine)


def test_who_is_not_asked_for_makes_room(tiny_folder: Path) -> None:
    engine = make_engine(tiny_folder)
    mine = drafter(runner(tiny_folder), num_blocks=4)
    first, second = (
        engine.prepare(Request(prompt_ids=[token_id] * 40, params=GREEDY, id=f"{token_id}")) for token_id in (1, 2)
    )
    for sequence in (first, second):
        sequence.append(3)
    mine.propose([first, second], ANY_PRICE)
    assert [len(first.draft_ids), len(second.draft_ids)] == [5, 0]
    mine.propose([second], ANY_PRICE)
    assert len(second.draft_ids) == 5
    for sequence in (first, second):
        mine.forget(sequence)
    assert holds_nothing(mine)


def test_a_draft_model_that_is_mostly_wrong_rests(tiny_folder: Path, other_folder: Path) -> None:
    asked = [Request(prompt_ids=[5, 6], params=replace(GREEDY, max_tokens=150), id="a")]
    wrong, right = (
        guessing_engine(tiny_folder, Eager(drafter(runner(folder)), FixedCost(2.0)))
        for folder in (other_folder, tiny_folder)
    )
    run(wrong, asked)
    run(right, asked)
    assert 0 < wrong.stats().num_draft_tokens < 20
    assert right.stats().num_steps < 150 / 4


def test_a_draft_model_that_takes_too_long_rests(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = drafter(runner(tiny_folder))
    mine._guess_s = None
    forward = mine._cache.forward

    def slow(step: PagedStep) -> NDArray[np.float32]:
        time.sleep(0.01)
        return forward(step)

    monkeypatch.setattr(mine._cache, "forward", slow)
    # A guess takes as long as 20 tokens, and no step takes longer than 3 beside its tokens.
    engine = guessing_engine(tiny_folder, Eager(mine, FixedCost(3.0, 0.0005)))
    run(engine, [Request(prompt_ids=[5, 6], params=replace(GREEDY, max_tokens=100), id="a")])
    stats = engine.stats()
    assert 0 < stats.num_accepted_tokens == stats.num_draft_tokens < 10
    # For a model whose steps take that long it is worth it.
    engine = guessing_engine(tiny_folder, Eager(mine, FixedCost(3.0, 0.1)))
    run(engine, [Request(prompt_ids=[5, 6], params=replace(GREEDY, max_tokens=100), id="a")])
    assert engine.stats().num_accepted_tokens > 50


@pytest.mark.parametrize("is_slow_when", ["it begins", "it reads"])
def test_what_is_slow_but_once_does_not_count_for_ever(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, is_slow_when: str
) -> None:
    mine = drafter(runner(tiny_folder))
    mine._guess_s = None
    forward = mine._cache.forward
    num_slow = 0

    def slow_at_times(step: PagedStep) -> NDArray[np.float32]:
        nonlocal num_slow
        if len(step.token_ids) > 9 if is_slow_when == "it reads" else engine.stats().num_steps < 3:
            time.sleep(0.2)
            num_slow += 1
        return forward(step)

    monkeypatch.setattr(mine._cache, "forward", slow_at_times)
    engine = guessing_engine(tiny_folder, Eager(mine, FixedCost(3.0, 0.02)))
    prompt = list(range(20 if is_slow_when == "it reads" else 2))
    events = run(engine, [Request(prompt_ids=prompt, params=replace(GREEDY, max_tokens=140), id="a")])["a", 0]
    assert num_slow > 0
    lengths = [len(event.token_ids) for event in events]
    assert lengths[3:40] == [1] * 37 if is_slow_when == "it begins" else len(lengths) < 40
    assert max(lengths[40:], default=2) > 1


def test_what_rests_is_tried_again(tiny_folder: Path) -> None:
    mine = drafter(runner(tiny_folder))
    engine = guessing_engine(tiny_folder, Eager(mine, FixedCost(0.5)))
    engine.add(engine.prepare(Request(prompt_ids=[5, 6], params=replace(GREEDY, max_tokens=150), id="a")))
    engine.step()
    engine.step()
    (reading,) = mine._readings.values()
    reading.rate.value = 0.0
    lengths = [len(event.token_ids) for _ in range(150) for event in engine.step()]
    assert lengths[:15] == [1] * 15
    assert max(lengths) > 2


def test_damaged_weights_of_the_draft_cost_no_answer(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mine = drafter(runner(tiny_folder))
    monkeypatch.setattr(mine._cache, "forward", lambda step: np.full((len(step.wanted), 274), np.nan, np.float32))
    asked = ways(5)
    engine = guessing_engine(tiny_folder, Eager(mine))
    with caplog.at_level(logging.WARNING):
        found = run(engine, asked)
    assert {key: said(events) for key, events in found.items()} == plain(tiny_folder, asked)
    assert "the draft model's logits are not finite" in caplog.text
    assert engine.stats().num_draft_tokens == 0


class Chain:
    """A runner of a Markov chain: the logits depend on the last token, and in their last bits on the step's size."""

    profile: Profile = "fast"
    max_model_len, vocab_size, block_bytes = 64, 3, 1

    def __init__(self, seed: int) -> None:
        self.logits = np.random.default_rng(seed).normal(0, 1.2, (3, 3)).astype(np.float32)

    def paged_cache(self, num_blocks: int) -> Chain:
        return self

    def forward(self, step: PagedStep) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = self.logits[step.token_ids[step.wanted]] + np.float32(1e-4 * len(step.token_ids))
        return rows

    def copy(self, source: int, target: int) -> None:
        pass


def chain_answers(runner: Chain, drafter: Drafter | None, tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    """Four tokens with each of 4,000 seeds."""
    settings = EngineSettings(cache_bytes=1000, max_running=32)
    engine = Engine(runner, SequenceFactory(tokenizer, 3), settings, drafter)
    params = SamplingParams(temperature=0.9, max_tokens=4, ignore_eos=True)
    asked = [
        Request(prompt_ids=[0, 1, 2, 0, 1], params=replace(params, seed=seed), id=f"{seed}") for seed in range(4000)
    ]
    yield from (tuple(tokens(events)) for events in run(engine, asked).values())
    if drafter is not None:
        assert 0.2 < engine.stats().num_accepted_tokens / engine.stats().num_draft_tokens < 0.95


def chi_square(answers: Iterator[tuple[int, ...]], runner: Chain) -> float:
    """Of the 81 answers that can be, in standard deviations above the mean that it has if `runner` is what spoke."""
    params = SamplingParams(temperature=0.9)
    chances = [probabilities(row, params) for row in runner.logits]
    found = Counter(answers)
    total = 0.0
    for answer in itertools.product(range(3), repeat=4):
        expected = 4000 * np.prod([chances[last][this] for last, this in itertools.pairwise((1, *answer))])
        total += (found[answer] - expected) ** 2 / expected
    return float((total - 80) / np.sqrt(2 * 80))


def test_in_any_profile_the_distribution_is_the_model_s(tiny_tokenizer: Tokenizer) -> None:
    speaks, guesses = Chain(1), Chain(2)
    assert chi_square(chain_answers(speaks, None, tiny_tokenizer), speaks) < 4
    assert chi_square(chain_answers(guesses, None, tiny_tokenizer), speaks) > 20, "the test would notice guesses"
    for one in (ModelDrafter(guesses, 3, num_draft_tokens=3, num_blocks=1000), NgramDrafter(3)):
        assert chi_square(chain_answers(speaks, Eager(one), tiny_tokenizer), speaks) < 4


def test_an_engine_is_started_with_a_draft_model(tiny_folder: Path, other_folder: Path) -> None:
    settings = EngineSettings(cache_bytes=1 << 20, num_draft_tokens=3)
    asked = ways(8)
    for changes, kind in [({}, NgramDrafter), ({"draft_model": str(other_folder)}, ModelDrafter)]:
        started = start_engine(str(tiny_folder), LoadOptions(), replace(settings, **changes))
        engine = started.engine.engine
        assert isinstance(engine._drafter, kind)
        engine._drafter = Eager(engine._drafter)
        found = run(engine, asked)
        assert {key: said(events) for key, events in found.items()} == plain(tiny_folder, asked)
        assert engine.stats().num_draft_tokens > 0
    assert isinstance(mine := engine._drafter._drafter, ModelDrafter)
    # Both caches are as long, and together within what was given.
    own, draft = runner_of(engine).block_bytes, runner(other_folder).block_bytes
    num_blocks = (1 << 20) // (own + draft)
    assert engine.stats().num_blocks == num_blocks
    assert mine._blocks.num_blocks == num_blocks
    plain_engine = start_engine(str(tiny_folder), LoadOptions(), EngineSettings(cache_bytes=1 << 20)).engine.engine
    assert plain_engine._drafter is None


def test_a_draft_model_must_speak_with_the_same_tokens(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match=r"the draft model nano speaks with other tokens: id \d+ is '.*' and not '"):
        start_engine(str(tiny_folder), LoadOptions(), EngineSettings(draft_model="nano", num_draft_tokens=2))
    with pytest.raises(UserError, match=r"there is no folder or file \./nowhere"):
        start_engine(str(tiny_folder), LoadOptions(), EngineSettings(draft_model="./nowhere", num_draft_tokens=2))
    with pytest.raises(UserError, match=r"the cache leaves no block of [0-9,]+ bytes to the draft model: give it more"):
        settings = EngineSettings(draft_model=str(tiny_folder), num_draft_tokens=2, cache_bytes=5000)
        start_engine(str(tiny_folder), LoadOptions(), settings)
