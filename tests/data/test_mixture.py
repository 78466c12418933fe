from __future__ import annotations

from collections import Counter

import pytest

from openbook.core.config import convert
from openbook.core.errors import UserError
from openbook.core.seeding import TRAIN_SEED_START
from openbook.data.mixture import NUM_ATTEMPTS, Mixture, MixtureEntry

ENTRIES = [
    MixtureEntry(task="gcd", weight=3.0, efforts={"high": 1.0, "low": 1.0}),
    MixtureEntry(task="lcm"),
]


def test_choice_is_a_function_of_seed_and_index() -> None:
    first, second = Mixture(ENTRIES, 7), Mixture(ENTRIES, 7)
    forward = [first.choose(index) for index in range(50)]
    backward = [second.choose(index) for index in reversed(range(50))]
    assert forward == backward[::-1]
    assert forward != [Mixture(ENTRIES, 8).choose(index) for index in range(50)]


def test_order_of_efforts_decides_nothing() -> None:
    turned = [MixtureEntry(task="gcd", weight=3.0, efforts={"low": 1.0, "high": 1.0}), ENTRIES[1]]
    for index in range(50):
        assert Mixture(turned, 7).choose(index).effort == Mixture(ENTRIES, 7).choose(index).effort


def test_weights_and_efforts_are_shares() -> None:
    mixture = Mixture(ENTRIES, 3)
    counts = Counter((c.entry.task, c.effort) for c in map(mixture.choose, range(4000)))
    expected = {("gcd", "low"): 1500, ("gcd", "high"): 1500, ("lcm", "medium"): 1000}
    assert counts.keys() == expected.keys()
    assert all(abs(counts[key] - number) < 150 for key, number in expected.items())


def test_problem_seeds_are_for_training_and_unique() -> None:
    mixture = Mixture(ENTRIES, 3)
    seeds = [mixture.problem_seed(index, attempt) for index in range(300) for attempt in range(NUM_ATTEMPTS)]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= TRAIN_SEED_START
    assert max(seeds) < 2**32


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"task": "gcd", "weight": 0}, r"^x: weight is 0.0, expected more than 0; correct that value$"),
        (
            {"task": "gcd", "efforts": {"low": 0.0}},
            r"efforts are {'low': 0.0}, expected shares from 0 up, at least one",
        ),
        ({"task": "gcd", "efforts": {"max": 1.0}}, r"efforts.*nvalid enum value 'max'"),
        ({"task": "gcd", "wieght": 1}, r"unknown key 'wieght': did you mean 'weight'\?"),
    ],
)
def test_wrong_entries_are_one_line(values: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        convert(values, MixtureEntry, "x")
