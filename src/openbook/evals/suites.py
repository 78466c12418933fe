"""Suites: names for lists of tasks."""

from __future__ import annotations

from openbook.checkpoint.locate import bundled_names, locate
from openbook.core.errors import unknown_name
from openbook.engine.provenance import read_tasks
from openbook.tasks.registry import all_tasks

ALL = "all"


def task_names(suite: str) -> list[str]:
    """The tasks of a suite, each once, in the order given.

    Args:
        suite: names joined by commas; a name is a task, a group of tasks ("arithmetic"), a bundled model (the tasks it
            was trained on), or "all".

    Raises:
        UserError: a name is not known; the message has the nearest one.
    """
    return list(dict.fromkeys(task for name in suite.split(",") for task in _tasks_of(name.strip())))


def _tasks_of(name: str) -> list[str]:
    tasks = all_tasks()
    groups: dict[str, list[str]] = {}
    for task in tasks.values():
        groups.setdefault(task.group, []).append(task.name)
    if name == ALL:
        return list(tasks)
    if name in tasks:
        return [name]
    if name in groups:
        return groups[name]
    models = bundled_names()
    if name in models:
        return read_tasks(locate(name))
    others = ", ".join([ALL, *groups, *models])
    raise unknown_name(
        "suite", name, [ALL, *tasks, *groups, *models], f"give a task (`openbook tasks` lists all) or {others}"
    )
