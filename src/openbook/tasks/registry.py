"""All tasks by name."""

from __future__ import annotations

from functools import cache

from openbook.core.errors import unknown_name
from openbook.tasks.base import Task


@cache
def all_tasks() -> dict[str, Task]:
    """Every task, keyed by its reasoning-gym name, in the order of the groups."""
    from openbook.tasks import arithmetic, games, number_theory, strings

    tasks = [*number_theory.TASKS, *arithmetic.TASKS, *strings.TASKS, *games.TASKS]
    return {task.name: task for task in tasks}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: there is none; the message has the nearest one.
    """
    tasks = all_tasks()
    if name not in tasks:
        raise unknown_name("task", name, tasks, "`openbook tasks` lists all")
    return tasks[name]
