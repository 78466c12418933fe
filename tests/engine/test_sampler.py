"""Sampling: parity with Transformers' filters, the right frequencies, and independence of the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from openbook.core.errors import UserError
from openbook.engine.request import SamplingParams
from openbook.engine.sampler import probabilities, sample, uniform


def random_logits(rows: int, vocab: int = 50, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (3 * np.random.default_rng(seed).standard_normal((rows, vocab))).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1), (7, 0.6, 0.0), (9, 0.9, 0.2), (1, 1.0, 0.0)],
)
def test_filters_equal_those_of_transformers(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    logits = random_logits(20)
    theirs = warpers(None, torch.from_numpy(logits).double()).softmax(-1).numpy()
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for row in range(len(logits)):
        np.testing.assert_allclose(probabilities(logits[row], params), theirs[row], rtol=0, atol=1e-12)


def test_greedy_takes_the_most_likely_and_the_lowest_id_of_equals() -> None:
    logits = np.array([[0, 2, 2, 1], [5, 1, 1, 1]], dtype=np.float32)
    greedy = SamplingParams(top_k=1, min_p=1.0)
    assert sample(logits, [greedy, greedy], [0, 0]).tolist() == [1, 0]


def test_drawn_tokens_come_in_the_right_frequencies() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.0, 0.2], dtype=np.float32).clip(1e-30))
    params = SamplingParams(temperature=1.0, seed=7)
    drawn = sample(np.tile(logits, (4000, 1)), [params] * 4000, range(4000))
    shares = np.bincount(drawn, minlength=4) / 4000
    # three standard errors of the largest share are 0.024
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.0, 0.2], atol=0.025)


@given(st.integers(0, 2**64 - 1), st.integers(0, 100_000))
@settings(max_examples=50, deadline=None)
def test_random_numbers_are_a_function_of_seed_and_position(seed: int, position: int) -> None:
    number = uniform(seed, position)
    assert 0 <= number < 1
    assert number == uniform(seed, position)
    assert number != uniform(seed, position + 1)


def test_random_numbers_are_those_of_philox_on_every_machine() -> None:
    # Golden values: they change what a seed means, so a change of them is a new version of every sampled answer.
    assert [uniform(5, 7), uniform(5, 8)] == [0.8046818380857231, 0.2811420827285851]


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = random_logits(9)
    params = [SamplingParams(temperature=0.4 + row / 5, top_k=row, top_p=0.95, seed=row) for row in range(9)]
    together = sample(logits, params, range(9))
    alone = [int(sample(logits[row : row + 1], [params[row]], [row])[0]) for row in range(9)]
    assert together.tolist() == alone
    order = [4, 0, 8, 2]
    assert sample(logits[order], [params[row] for row in order], order).tolist() == [alone[row] for row in order]


def test_huge_logits_and_tiny_temperatures_do_not_overflow() -> None:
    logits = np.array([3e38, -3e38, 1.0], dtype=np.float32)
    np.testing.assert_array_equal(probabilities(logits, SamplingParams(temperature=1e-6)), [1.0, 0.0, 0.0])


def test_logits_that_are_no_numbers_are_an_error_and_ruled_out_tokens_are_not() -> None:
    logits = random_logits(2)
    logits[0, 3] = -np.inf
    assert sample(logits, [SamplingParams()] * 2, [0, 0]).tolist() == logits.argmax(axis=-1).tolist()
    logits[1, 3] = np.nan
    with pytest.raises(UserError, match="logits are not finite: its weights are damaged; `openbook verify`"):
        sample(logits, [SamplingParams()] * 2, [0, 0])
