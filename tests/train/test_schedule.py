"""The learning rate's trapezoid."""

from __future__ import annotations

import pytest

from openbook.core.config import convert
from openbook.core.errors import UserError
from openbook.train.schedule import ScheduleConfig, learning_rate


def test_warmup_plateau_decay() -> None:
    config = ScheduleConfig(lr=1.0, warmup_steps=4, decay_share=0.5, final_lr_share=0.1)
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(rates[4:11]) == {1.0}
    assert rates[10] == 1.0
    assert rates[11] == pytest.approx(0.1 + 0.9 * 0.9)
    assert rates[19] == pytest.approx(0.1 + 0.9 * 0.1)
    assert rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True)


def test_without_warmup_and_decay_it_is_constant() -> None:
    config = ScheduleConfig(lr=0.3, warmup_steps=0, decay_share=0.0)
    assert {learning_rate(config, step, 7) for step in range(7)} == {0.3}


def test_a_rate_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match=r"the test: .*lr is 0.0, expected a number above 0"):
        convert({"lr": 0}, ScheduleConfig, "the test")
