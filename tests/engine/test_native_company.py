"""What shares a step with a sequence changes no bit of it: 32 prompts in any company, order and pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import openbook
from openbook.checkpoint.model_source import open_model
from openbook.engine.choices import CACHE_KINDS, CacheKind
from openbook.engine.native_load import load_native
from openbook.engine.native_runner import NativeRunner, allocate_cache
from openbook.engine.paged import BLOCK_TOKENS
from openbook.models.config import ModelConfig

NANO = Path(openbook.__file__).parent / "releases" / "nano"
NUM_PROMPTS, NUM_NEW = 32, 6
PREFIX_TOKENS = 2 * BLOCK_TOKENS  # that all prompts begin with
TABLE_PAGES = 12

# Of each prompt the tokens chosen, and the logits they were chosen by.
Answers = dict[int, tuple[list[int], list[bytes]]]


class Sequences:
    """Prompts that are computed together as an engine would: each step takes a piece of a prompt, or a new token."""

    def __init__(
        self, runner: NativeRunner, config: ModelConfig, prompts: Sequence[Sequence[int]], is_warm: bool
    ) -> None:
        self._runner, self._prompts = runner, prompts
        pages = np.random.default_rng(len(prompts)).permutation(len(prompts) * TABLE_PAGES + 2).astype(np.int32)
        self._cache = allocate_cache(config, len(pages), runner.cache_kind)
        self._tables = pages[2:].reshape(len(prompts), TABLE_PAGES).copy()
        self._lengths = [0] * len(prompts)
        if is_warm:  # one sequence has computed the prefix, all others read its pages
            self._tables[:, :2] = pages[:2]
            self._step([(0, prompts[0][:PREFIX_TOKENS])])
            self._lengths = [PREFIX_TOKENS] * len(prompts)

    def run(self, chunk: int) -> list[tuple[list[int], list[bytes]]]:
        """Reads all prompts `chunk` tokens at a time and continues each greedily as soon as it is read."""
        ids = [list(prompt) for prompt in self._prompts]
        found: list[tuple[list[int], list[bytes]]] = [([], []) for _ in ids]
        while any(len(tokens) < NUM_NEW for tokens, _ in found):
            busy = [row for row, (tokens, _) in enumerate(found) if len(tokens) < NUM_NEW]
            parts = [(row, ids[row][self._lengths[row] :][:chunk]) for row in busy]
            for (row, _), logits in zip(parts, self._step(parts), strict=True):
                if self._lengths[row] == len(ids[row]):
                    found[row][0].append(int(logits.argmax()))
                    found[row][1].append(logits.tobytes())
                    ids[row].append(found[row][0][-1])
        return found

    def _step(self, parts: Sequence[tuple[int, Sequence[int]]]) -> NDArray[np.float32]:
        """Appends tokens to some sequences; the logits after the last of each."""
        sequences, ids, positions, wanted = [], [], [], []
        for row, part in parts:
            sequences += [row] * len(part)
            ids += part
            positions += range(self._lengths[row], self._lengths[row] + len(part))
            self._lengths[row] += len(part)
            wanted.append(len(ids) - 1)
        logits = np.empty((len(parts), self._runner.vocab_size), np.float32)
        arrays = (np.array(values, np.int32) for values in (ids, positions, sequences))
        cosines, sines = self._runner.rope(TABLE_PAGES * BLOCK_TOKENS)
        self._runner.decoder.step(
            *arrays, self._tables, *self._cache, cosines, sines, np.array(wanted, np.int32), logits
        )
        return logits


@pytest.fixture(scope="module", params=CACHE_KINDS)
def setting(request: pytest.FixtureRequest) -> Iterator[tuple[NativeRunner, ModelConfig, list[list[int]], Answers]]:
    """nano, 32 prompts of 33 to 150 tokens, and the answer of each alone in one piece."""
    source = open_model(NANO)
    kind: CacheKind = request.param
    runner = load_native(source, kind)
    draw = np.random.default_rng(5)
    prefix = draw.integers(0, runner.vocab_size, PREFIX_TOKENS).tolist()
    prompts = [
        prefix + draw.integers(0, runner.vocab_size, length).tolist() for length in draw.integers(1, 119, NUM_PROMPTS)
    ]
    alone = {
        index: Sequences(runner, source.config, [prompt], False).run(512)[0] for index, prompt in enumerate(prompts)
    }
    yield runner, source.config, prompts, alone


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("chunk", [16, 512])
@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_company_order_and_pieces_change_nothing(
    setting: tuple[NativeRunner, ModelConfig, list[list[int]], Answers], size: int, chunk: int, is_warm: bool
) -> None:
    runner, config, prompts, alone = setting
    shuffled = np.random.default_rng(size).permutation(NUM_PROMPTS).tolist()
    for order in (list(range(NUM_PROMPTS)), shuffled):
        for start in range(0, NUM_PROMPTS, size):
            members = order[start : start + size]
            found = Sequences(runner, config, [prompts[index] for index in members], is_warm).run(chunk)
            for index, answer in zip(members, found, strict=True):
                assert answer == alone[index], f"prompt {index} of {members}"


def test_the_prompts_have_answers_of_their_own(
    setting: tuple[NativeRunner, ModelConfig, list[list[int]], Answers],
) -> None:
    alone = setting[3]
    assert len({logits[0] for _, logits in alone.values()}) == NUM_PROMPTS
    assert len({tuple(tokens) for tokens, _ in alone.values()}) > NUM_PROMPTS // 2
