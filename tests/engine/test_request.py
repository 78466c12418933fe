"""Sampling parameters and requests: what is refused, and in which words."""

from __future__ import annotations

from typing import Any

import pytest

from openbook.core.errors import UserError
from openbook.engine.request import Request, SamplingParams


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"temperature": -0.5}, "temperature is -0.5: expected 0 or more; correct that value"),
        ({"temperature": float("nan")}, "temperature is nan: expected 0 or more; correct that value"),
        ({"top_k": -1}, "top_k is -1: expected 0 (all tokens) or more; correct that value"),
        ({"top_p": 0.0}, "top_p is 0.0: expected more than 0 and at most 1; correct that value"),
        ({"min_p": 1.5}, "min_p is 1.5: expected from 0 to 1; correct that value"),
        ({"stop": ("ok", "")}, "stop is ['ok', '']: expected strings that are not empty; correct that value"),
        ({"max_tokens": 0}, "max_tokens is 0: expected 1 or more; correct that value"),
        ({"seed": -1}, "seed is -1: expected from 0 to 2^64 - 1; correct that value"),
    ],
)
def test_a_value_out_of_range_is_one_line(values: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        SamplingParams(**values)
    assert str(error.value) == line


def test_room_is_the_smaller_of_context_and_max_tokens() -> None:
    assert Request(prompt_ids=[1, 2, 3], params=SamplingParams()).num_new_tokens(10) == 7
    assert Request(prompt_ids=[1, 2, 3], params=SamplingParams(max_tokens=4)).num_new_tokens(10) == 4
    assert Request(prompt_ids=[1, 2, 3], params=SamplingParams(max_tokens=40)).num_new_tokens(10) == 7


def test_a_prompt_past_the_context_names_both_numbers() -> None:
    with pytest.raises(UserError) as error:
        Request(prompt_ids=[1] * 1200, params=SamplingParams()).num_new_tokens(1024)
    assert str(error.value) == (
        "the prompt has 1,200 tokens and the model's context is 1,024 (prompt and answer): shorten the prompt"
    )


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="the prompt is empty: expected at least one token; give some text"):
        Request(prompt_ids=[], params=SamplingParams()).num_new_tokens(8)
