"""Suites: names for lists of tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from openbook.checkpoint import locate as locate_module
from openbook.core.errors import UserError
from openbook.evals.suites import task_names
from openbook.tasks.registry import all_tasks


@pytest.fixture(autouse=True)
def bundled(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one bundled model is `tiny`."""
    monkeypatch.setattr(locate_module, "releases_dir", lambda: tiny_folder.parent)


def test_a_task_a_list_and_all() -> None:
    assert task_names("gcd") == ["gcd"]
    assert task_names("lcm, gcd,lcm") == ["lcm", "gcd"]
    assert task_names("all") == list(all_tasks())


def test_a_group_is_its_tasks() -> None:
    group = all_tasks()["gcd"].group
    assert task_names(group) == [task.name for task in all_tasks().values() if task.group == group]


def test_a_bundled_model_is_the_tasks_it_was_trained_on() -> None:
    assert task_names("tiny") == ["gcd", "spell_backward", "lcm"]


def test_an_unknown_suite_is_one_line() -> None:
    with pytest.raises(UserError) as error:
        task_names("gcd,spell_backwards")
    assert str(error.value).startswith(
        "unknown suite 'spell_backwards': did you mean 'spell_backward'? "
        "give a task (`openbook tasks` lists all) or all, "
    )
    assert str(error.value).endswith(", tiny")
