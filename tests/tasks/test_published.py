"""Training must refuse the published test items: the shipped digests are those of the generators."""

from __future__ import annotations

from openbook.core.files import read_json
from openbook.tasks.base import DIFFICULTIES, NUM_PUBLISHED_ITEMS, PUBLISHED_SEED, TRAIN_SEED_START
from openbook.tasks.published import DIGESTS_PATH, is_published, published_digests
from openbook.tasks.registry import all_tasks


def test_the_shipped_digests_are_those_of_the_generators() -> None:
    assert read_json(DIGESTS_PATH) == published_digests(), "run `python -m openbook.tasks.published`"


def test_published_items_are_known_whatever_white_space_surrounds_them() -> None:
    for task in all_tasks().values():
        for difficulty in DIFFICULTIES:
            last = task.generate(PUBLISHED_SEED + NUM_PUBLISHED_ITEMS - 1, difficulty).question
            assert is_published(last)
            assert is_published(f"\n  {last.strip()} \n")
            assert not is_published(last.strip()[:-1])


def test_hard_items_of_other_seeds_are_not_published() -> None:
    # Some easy problems are so small that other seeds repeat them; these two have too many possibilities for that.
    for name in ("ab", "n_queens"):
        task = all_tasks()[name]
        assert not any(is_published(task.generate(TRAIN_SEED_START + seed, "hard").question) for seed in range(20))
