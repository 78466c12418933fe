"""Steps over blocks through a runner: the logits asked for, prompts with images in pieces, both profiles, devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from openbook.core.errors import UserError
from openbook.engine import torch_images
from openbook.engine.paged import BLOCK_TOKENS, PagedCache, PagedRunner, PagedStep, PromptImages
from openbook.engine.torch_runner import TorchRunner
from openbook.models.base import CausalModel
from openbook.models.context import DenseContext
from openbook.ops.base import Ops
from openbook.ops.blocked import can_be_blocked
from openbook.ops.exact_ops import ExactOps
from openbook.ops.torch_ops import TorchOps
from openbook.tokenizer.images import ImagePatches
from tiny_families import FAMILIES, IMAGE_TOKEN, VISION, make_model

CLOSE = {"atol": 1e-4, "rtol": 0}
OPS: dict[str, type[Ops]] = {"fast": TorchOps, "exact": ExactOps}
TABLES = np.array([[5, 2, 9, 0], [1, 8, 3, 7], [4, 6, 10, 11]], np.int32)
NUM_BLOCKS = 12

# Of each sequence of a step: its row of TABLES, token ids, position of the first, images.
Part = tuple[int, Sequence[int], int, PromptImages | None]


def make_step(*parts: Part, wanted: Sequence[int] | None = None) -> PagedStep:
    """A step, by default with all logits wanted."""
    ids = [token for _, tokens, _, _ in parts for token in tokens]
    positions = [first + place for _, tokens, first, _ in parts for place in range(len(tokens))]
    sequences = [number for number, (_, tokens, _, _) in enumerate(parts) for _ in tokens]
    return PagedStep(
        token_ids=np.array(ids, np.int32),
        positions=np.array(positions, np.int32),
        sequences=np.array(sequences, np.int32),
        block_tables=TABLES[[table for table, _, _, _ in parts]],
        wanted=np.array(range(len(ids)) if wanted is None else wanted, np.int32),
        images=[images for _, _, _, images in parts] if any(images for _, _, _, images in parts) else (),
    )


def assert_equal(found: NDArray[np.float32], expected: NDArray[np.float32], profile: str) -> None:
    if profile == "exact":
        assert found.tobytes() == expected.tobytes()
    else:
        np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.fixture(params=OPS)
def profile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 50, length).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_runner_is_paged(family: str) -> None:
    runner = TorchRunner(make_model(FAMILIES[family], TorchOps()))
    assert isinstance(runner, PagedRunner)
    cache: PagedCache = runner.paged_cache(NUM_BLOCKS)
    assert cache.forward(make_step((0, [1, 2], 0, None), wanted=[1])).shape == (1, runner.vocab_size)


def test_a_block_has_its_bytes() -> None:
    config = FAMILIES["qwen3_moe"]
    runner = TorchRunner(make_model(config, TorchOps()).to(torch.bfloat16))
    assert runner.block_bytes == BLOCK_TOKENS * 2 * 2 * (8 + 8) * 2


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_step_gives_the_logits_that_are_wanted(family: str, profile: str) -> None:
    model = make_model(FAMILIES[family], OPS[profile]())
    runner = TorchRunner(model)
    prompts = [text(37), text(20, seed=1)]
    expected = [runner.logits(np.array([ids], np.int64))[0] for ids in prompts]
    cache = runner.paged_cache(NUM_BLOCKS)
    nothing = cache.forward(make_step((0, prompts[0][:30], 0, None), wanted=[]))
    assert nothing.shape == (0, 61)
    assert nothing.dtype == np.float32
    step = make_step((0, prompts[0][30:], 30, None), (1, prompts[1], 0, None), wanted=[0, 6, 9, 26])
    found = cache.forward(step)
    assert found.dtype == np.float32
    assert_equal(found, np.stack([expected[0][30], expected[0][36], expected[1][2], expected[1][19]]), profile)


def test_decoding_equals_that_of_a_batch(profile: str) -> None:
    """Greedy, beside a prompt that is still being read."""
    runner = TorchRunner(make_model(FAMILIES["deepseek_v2"], OPS[profile]()))
    prompt, other = text(23), text(40, seed=1)
    batch, cache = runner.start(1, 40), runner.paged_cache(NUM_BLOCKS)
    theirs = batch.forward(np.array([prompt]), np.array([len(prompt)]))
    ours = cache.forward(make_step((2, prompt, 0, None), wanted=[22]))
    for position in range(23, 33):
        assert_equal(ours, theirs, profile)
        token = int(ours.argmax())
        theirs = batch.forward(np.array([[token]]), np.array([1]))
        read = 4 * (position - 23)
        ours = cache.forward(make_step((1, other[read : read + 4], read, None), (2, [token], position, None)))[4:]
    assert_equal(ours, theirs, profile)


def test_a_block_is_copied_in_all_layers() -> None:
    runner = TorchRunner(make_model(FAMILIES["gpt_oss"], TorchOps()))
    prompt = text(12)
    cache = runner.paged_cache(NUM_BLOCKS)
    cache.forward(make_step((0, prompt[:9], 0, None)))
    cache.copy(int(TABLES[0, 0]), int(TABLES[1, 0]))
    found = cache.forward(make_step((1, prompt[9:], 9, None)))
    np.testing.assert_allclose(found, runner.logits(np.array([prompt]))[0, 9:], **CLOSE)


def test_adapters_that_are_not_loaded_are_refused() -> None:
    cache = TorchRunner(make_model(FAMILIES["qwen3_moe"], TorchOps())).paged_cache(NUM_BLOCKS)
    step = make_step((0, [1], 0, None), (1, [2], 0, None))
    fields = {name: getattr(step, name) for name in step.__dataclass_fields__}
    assert len(cache.forward(PagedStep(**{**fields, "adapters": (None, None)}))) == 2
    with pytest.raises(UserError, match=r"^unknown adapter 'poet': loaded are none; load it first$"):
        cache.forward(PagedStep(**{**fields, "adapters": (None, "poet")}))


@pytest.mark.skipif(
    not can_be_blocked(torch.empty(2, 2, dtype=torch.bfloat16)), reason="this CPU multiplies no bfloat16 in oneDNN"
)
def test_the_first_new_token_lays_matrices_out() -> None:
    model = make_model(FAMILIES["qwen3_moe"], TorchOps()).to(torch.bfloat16)
    cache = TorchRunner(model).paged_cache(NUM_BLOCKS)
    cache.forward(make_step((0, text(20), 0, None), (1, [1], 0, None)))
    assert model.blocked_output_weight is None
    cache.forward(make_step((0, [3], 20, None), (1, text(9), 1, None)))
    assert model.blocked_output_weight is not None


def image(rows: int, columns: int, seed: int) -> ImagePatches:
    values = np.random.default_rng(seed).normal(size=(rows * columns, VISION.patch_dim)).astype(np.float32)
    return ImagePatches(patches=values, grid=(rows, columns), num_tokens=rows * columns // 4)


WIDE, TALL, SMALL = image(4, 12, 0), image(10, 2, 1), image(2, 2, 2)


def seeing(*parts: list[int] | ImagePatches) -> tuple[list[int], PromptImages]:
    """A prompt of text and images."""
    ids: list[int] = []
    for part in parts:
        ids += part if isinstance(part, list) else [59, *[IMAGE_TOKEN] * part.num_tokens, 60]
    return ids, PromptImages(prompt_ids=ids, images=[part for part in parts if isinstance(part, ImagePatches)])


@torch.inference_mode()
def logits_of(model: CausalModel, ids: list[int], given: PromptImages) -> NDArray[np.float32]:
    """[T, V] of a whole row, whose prompt is its beginning."""
    patches = [torch.from_numpy(one.patches) for one in given.images]
    placed = model.place_images([given.prompt_ids], [patches], [[one.grid for one in given.images]])
    values: NDArray[np.float32] = model(torch.tensor([ids]), DenseContext(1, len(ids), images=placed))[0].numpy()
    return values


class Counted:
    """The images that a model encodes, in order."""

    def __init__(self, model: CausalModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.grids: list[tuple[int, int]] = []
        whole = model.encode_image
        monkeypatch.setattr(model, "encode_image", lambda *given: (self.grids.append(given[1]), whole(*given))[1])


@pytest.fixture
def seer(profile: str) -> CausalModel:
    return make_model(FAMILIES["qwen2_vl"], OPS[profile]())


@pytest.mark.parametrize("size", [1, 3, 16, 60])
def test_prompts_with_images_in_pieces(
    seer: CausalModel, profile: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut anywhere, inside of images too, beside a sequence without any; then tokens behind the prompts."""
    prompts = [
        seeing(text(5), WIDE, text(3, seed=1), TALL, [7]),
        (text(31, seed=2), None),
        seeing(SMALL, text(16, seed=3), SMALL),
    ]
    new = text(6, seed=4)
    rows = [[*ids, *new] for ids, _ in prompts]
    expected = [
        logits_of(seer, row, given) if given else TorchRunner(seer).logits(np.array([row]))[0]
        for row, (_, given) in zip(rows, prompts, strict=True)
    ]
    counted = Counted(seer, monkeypatch)
    cache = TorchRunner(seer).paged_cache(NUM_BLOCKS)
    done = [0, 0, 0]
    while any(count < len(row) for count, row in zip(done, rows, strict=True)):
        parts: list[Part] = []
        wanted = []
        for number, (row, (ids, given)) in enumerate(zip(rows, prompts, strict=True)):
            count = min(size, len(ids) - done[number]) if done[number] < len(ids) else 1
            if done[number] < len(row):
                parts.append((number, row[done[number] : done[number] + count], done[number], given))
                wanted.append(expected[number][done[number] : done[number] + count])
                done[number] += count
        assert_equal(cache.forward(make_step(*parts)), np.concatenate(wanted), profile)
    assert sorted(counted.grids) == [(2, 2), (4, 12), (10, 2)]  # each once, the small one for both of its places


def test_images_that_are_cached_are_not_encoded(
    seer: CausalModel, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of another sequence hold an image, and the begin of a second one."""
    first, first_images = seeing(text(5), SMALL, text(3), TALL, text(4))
    begin = 16  # in the middle of the second image
    assert first[begin - 1] == first[begin] == IMAGE_TOKEN
    second = first[:-4] + text(9, seed=5)
    second_images = PromptImages(prompt_ids=second, images=first_images.images)
    expected = logits_of(seer, second, second_images)
    cache = TorchRunner(seer).paged_cache(NUM_BLOCKS)
    cache.forward(make_step((0, first, 0, first_images)))
    cache.copy(int(TABLES[0, 0]), int(TABLES[1, 0]))
    cache._images._encoded.clear()  # as long after the first sequence
    counted = Counted(seer, monkeypatch)
    assert_equal(cache.forward(make_step((1, second[begin:], begin, second_images))), expected[begin:], profile)
    assert counted.grids == [(10, 2)]
    # The rest is text: its positions go on behind the images, and nothing is encoded.
    behind = len(second) - 7
    cache._images._encoded.clear()
    assert_equal(cache.forward(make_step((1, second[behind:], behind, second_images))), expected[behind:], profile)
    assert counted.grids == [(10, 2)]


def test_only_some_images_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seer = make_model(FAMILIES["qwen2_vl"], TorchOps())
    monkeypatch.setattr(torch_images, "KEPT_FEATURES", 13)
    monkeypatch.setattr(torch_images, "KEPT_PROMPTS", 2)
    prompts = [seeing(one) for one in (WIDE, SMALL, TALL)]
    expected = [logits_of(seer, ids, given) for ids, given in prompts]
    counted = Counted(seer, monkeypatch)
    cache = TorchRunner(seer).paged_cache(NUM_BLOCKS)
    for number, (ids, given) in enumerate(prompts):
        cache.forward(make_step((number, ids, 0, given)))
    assert list(cache._images._encoded) == [SMALL, TALL]
    assert [given for given, _ in cache._images._placed.values()] == [given for _, given in prompts[1:]]
    for number, (ids, given) in reversed(list(enumerate(prompts))):
        found = cache.forward(make_step((number, ids, 0, given)))
        np.testing.assert_allclose(found, expected[number], **CLOSE)
    assert counted.grids == [(4, 12), (2, 2), (10, 2), (4, 12)]  # the last of the three once more


def test_images_that_cannot_be_read_are_refused_before_anything_is_written() -> None:
    ids, given = seeing(text(3), SMALL)
    cache = TorchRunner(make_model(FAMILIES["qwen3_moe"], TorchOps())).paged_cache(NUM_BLOCKS)
    with pytest.raises(UserError, match=r"^a model of the family qwen3_moe reads no images: send text only$"):
        cache.forward(make_step((0, ids, 0, given)))
    cache = TorchRunner(make_model(FAMILIES["qwen2_vl"], TorchOps())).paged_cache(NUM_BLOCKS)
    wrong = PromptImages(prompt_ids=[*ids[:-2], 3, 60], images=given.images)
    with pytest.raises(UserError, match=r"^a prompt has 0 image tokens and its images make 1: expected one for each"):
        cache.forward(make_step((0, ids, 0, wrong)))
    narrow = ImagePatches(patches=np.zeros((4, 24), np.float32), grid=(2, 2), num_tokens=1)
    with pytest.raises(UserError, match=r"^an image's patches have 24 values, config.json says 96"):
        cache.forward(make_step((0, ids, 0, PromptImages(prompt_ids=ids, images=[narrow]))))
    assert not any(tensor.any() for tensors in cache._pool._kept for tensor in tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near(family: str) -> None:
    model = make_model(FAMILIES[family], TorchOps())
    prompt = text(40)
    expected = TorchRunner(model).logits(np.array([prompt]))[0]
    cache = TorchRunner(model.to(torch.bfloat16)).paged_cache(NUM_BLOCKS)
    found = [cache.forward(make_step((0, prompt[a:b], a, None))) for a, b in ((0, 20), (20, 39), (39, 40))]
    near = np.abs(np.concatenate(found) - expected)
    # Where a token's experts are close to others, rounding chooses others.
    assert np.median(near) < 0.05


@pytest.mark.cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_equals_the_cpu(family: str) -> None:
    model = make_model(FAMILIES[family], TorchOps())
    steps: list[Any] = []
    ids, given = seeing(text(5), WIDE, text(20)) if family == "qwen2_vl" else (text(40), None)
    steps.append(make_step((0, ids[:18], 0, given), (1, text(9), 0, None)))
    steps.append(make_step((0, ids[18:], 18, given), (1, [4], 9, None), (2, text(3), 0, None)))
    steps.append(make_step((0, [5], len(ids), given), (1, [4], 10, None), (2, [6, 7], 3, None)))
    cache = TorchRunner(model).paged_cache(NUM_BLOCKS)
    expected = [cache.forward(step) for step in steps]
    cache = TorchRunner(model.to("cuda")).paged_cache(NUM_BLOCKS)
    for step, wanted in zip(steps, expected, strict=True):
        np.testing.assert_allclose(cache.forward(step), wanted, atol=1e-3, rtol=1e-3)
