"""Segments cover every step once and end where a state is saved."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from openbook.train.recipe import load_recipe
from openbook.train.segments import is_saved_after, list_segments

MICRO = Path(__file__).parent.parent / "release" / "micro.toml"


def test_segments_of_two_stages() -> None:
    recipe = load_recipe(MICRO)  # 12 steps with states every 5, then 8 with states every 4
    segments = list_segments(recipe)
    assert [segment.number for segment in segments] == [1, 2, 3, 4, 5]
    assert [segment.stage_index for segment in segments] == [0, 0, 0, 1, 1]
    assert [(segment.first, segment.end) for segment in segments] == [(0, 5), (5, 10), (10, 12), (0, 4), (4, 8)]
    assert [(segment.first_step, segment.last_step) for segment in segments] == [
        (0, 4),
        (5, 9),
        (10, 11),
        (12, 15),
        (16, 19),
    ]
    assert all(before.last_step + 1 == after.first_step for before, after in pairwise(segments))
    assert sum(segment.num_steps for segment in segments) == 20
    for stage in recipe.stages:
        ends = [step for step in range(1, stage.steps + 1) if is_saved_after(stage, step)]
        assert ends == [s.end for s in segments if recipe.stages[s.stage_index] is stage]
