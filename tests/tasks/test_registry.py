"""Every task is whole, is found by its name, and is the same in every process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from openbook.core.errors import UserError
from openbook.tasks.base import DIFFICULTIES, NUM_PUBLISHED_ITEMS, PUBLISHED_SEED
from openbook.tasks.registry import all_tasks, get_task

PRINT_ALL = """
import hashlib
from openbook.tasks.registry import all_tasks
for task in all_tasks().values():
    for difficulty in ("easy", "hard"):
        problem = task.generate(1_000_000_007, difficulty)
        print(task.name, difficulty, hashlib.sha256(repr((problem.question, task.work(problem))).encode()).hexdigest())
"""


def test_every_task_says_what_it_is() -> None:
    tasks = all_tasks()
    assert len(tasks) >= 20
    for name, task in tasks.items():
        assert name == task.name
        assert type(task).__module__ == f"openbook.tasks.{task.group}"
        assert task.hard and 10 <= len(task.summary) <= 80
        assert task.summary == task.summary.strip(" .") and "\n" not in task.summary


def test_an_unknown_task_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(UserError) as error:
        get_task("spel_backwards")
    assert str(error.value) == (
        "unknown task 'spel_backwards': did you mean 'spell_backward'? `openbook tasks` lists all"
    )


def test_an_unknown_parameter_is_one_line() -> None:
    with pytest.raises(UserError) as error:
        get_task("ab").generate(1, size_of_it=3)
    assert "task ab with size_of_it=3" in str(error.value) and "\n" not in str(error.value)


# The published items of isomorphic_strings depend on the string hashes of the process that made them.
@pytest.mark.parametrize("name", sorted(set(all_tasks()) - {"isomorphic_strings"}))
def test_problems_are_the_published_items(name: str) -> None:
    from reasoning_gym.factory import create_dataset

    task = all_tasks()[name]
    for difficulty in DIFFICULTIES:
        params = dict(task.hard) if difficulty == "hard" else {}
        dataset = create_dataset(name, seed=PUBLISHED_SEED, size=NUM_PUBLISHED_ITEMS, **params)
        for item in range(NUM_PUBLISHED_ITEMS):
            problem = task.generate(PUBLISHED_SEED + item, difficulty)
            assert (problem.question, problem.entry["answer"]) == (dataset[item]["question"], dataset[item]["answer"])


def test_problems_and_work_do_not_depend_on_the_hash_seed() -> None:
    outputs = [
        subprocess.run(
            [sys.executable, "-c", PRINT_ALL],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0].splitlines()) == 2 * len(all_tasks())
