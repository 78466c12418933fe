"""The learning rate of a step: linear warm-up, a plateau, linear decay."""

from __future__ import annotations

import math

from openbook.core.config import Config


class ScheduleConfig(Config, frozen=True, kw_only=True):
    """Learning rate over one stage.

    lr: the plateau's learning rate.
    warmup_steps: steps of linear rise from 0.
    decay_share: share of the stage's steps, at its end, over which the rate falls linearly.
    final_lr_share: the last step's rate as a share of `lr`.
    """

    lr: float
    warmup_steps: int = 0
    decay_share: float = 0.3
    final_lr_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}, expected a number above 0")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, expected 0 or more")
        for name in ("decay_share", "final_lr_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 1")


def learning_rate(config: ScheduleConfig, step: int, num_steps: int) -> float:
    """The rate of step `step` (0-based) of `num_steps`: the trapezoid of arXiv 2405.18392."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = config.decay_share * num_steps
    left = num_steps - step
    decay = 1.0
    if left < decay_steps:
        decay = config.final_lr_share + (1.0 - config.final_lr_share) * left / decay_steps
    return config.lr * min(warmup, decay)
