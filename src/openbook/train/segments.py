"""Segments: the steps between two saved states, which can be replayed each by itself."""

from __future__ import annotations

from dataclasses import dataclass

from openbook.train.recipe import Recipe, StageConfig


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Steps of one stage, from a state to the next that is saved.

    number: from 1. stage_index: of the stage in the recipe. first, end: steps done in that stage before and after.
    first_step: number of its first step over all stages, from 0.
    """

    number: int
    stage_index: int
    first: int
    end: int
    first_step: int

    @property
    def num_steps(self) -> int:
        """Steps in the segment."""
        return self.end - self.first

    @property
    def last_step(self) -> int:
        """Number of its last step over all stages."""
        return self.first_step + self.num_steps - 1


def is_saved_after(stage: StageConfig, stage_step: int) -> bool:
    """Whether the state is saved when `stage_step` steps of the stage are done: there a segment ends."""
    return stage_step % stage.checkpoint_steps == 0 or stage_step == stage.steps


def list_segments(recipe: Recipe) -> list[Segment]:
    """All segments of a recipe, in order."""
    segments: list[Segment] = []
    stage_start = 0
    for index, stage in enumerate(recipe.stages):
        first = 0
        for step in range(1, stage.steps + 1):
            if is_saved_after(stage, step):
                segments.append(
                    Segment(
                        number=len(segments) + 1,
                        stage_index=index,
                        first=first,
                        end=step,
                        first_step=stage_start + first,
                    )
                )
                first = step
        stage_start += stage.steps
    return segments
