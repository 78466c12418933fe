"""Worked solutions of games: they score 1.0, and another reading of the steps agrees with them."""

from __future__ import annotations

import re

import pytest

from openbook.tasks import games
from openbook.tasks.base import DIFFICULTIES, TRAIN_SEED_START, Difficulty, Problem, Task, Work

TASKS = {task.name: task for task in games.TASKS}
SEEDS = [*range(41_000, 41_100), *range(TRAIN_SEED_START, TRAIN_SEED_START + 100)]


def cases(name: str, difficulty: Difficulty) -> list[tuple[Problem, Work]]:
    problems = [TASKS[name].generate(seed, difficulty) for seed in SEEDS[:40]]
    return [(problem, TASKS[name].work(problem)) for problem in problems]


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("task", games.TASKS, ids=lambda task: task.name)
def test_answers_score_one_and_work_is_the_same_each_time(task: Task, difficulty: Difficulty) -> None:
    for seed in SEEDS:
        problem = task.generate(seed, difficulty)
        work = task.work(problem)
        assert task.score(problem, work.answer) == 1.0, (seed, work)
        assert task.work(problem) == work
        assert work.steps.strip() and work.check.strip()


def rewrite(tokens: list[str]) -> list[str]:
    """The A::B system by its four rules, one rewrite at a time, from the right (the system is confluent)."""
    while True:
        for i in reversed(range(len(tokens) - 1)):
            left, right = tokens[i], tokens[i + 1]
            if left.endswith("#") and right.startswith("#"):
                tokens = tokens[:i] + ([] if left[0] == right[1] else [right, left]) + tokens[i + 2 :]
                break
        else:
            return tokens


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_ab_piles_are_what_the_rules_leave_of_each_beginning(difficulty: Difficulty) -> None:
    for problem, work in cases("ab", difficulty):
        program = problem.question.split("program:\n\n")[1].split("\n")[0].split(" ")
        walk, final = (line.strip() for line in work.steps.split("\n"))
        names: dict[str, str] = {}
        for index, step in enumerate(walk.split(", ")):
            name, token, *pile = step.split(" ")
            assert token == program[index]
            names[name] = token
            left = rewrite(program[: index + 1])
            letter = token.strip("#")
            waiting = [names[name] for name in pile if name in names]
            assert waiting == [other for other in left if other == f"{letter}#"]
        named = final.split(" ")
        if final != "-":
            assert [names[name] for name in named[::2]] == named[1::2]
            assert named[1::2] == work.answer.split(" ")
        assert rewrite(program) == work.answer.split()
        for before, after in re.findall(r"(\d+-\d+)=(\d+-\d+)", work.check):
            first, second = ([int(number) for number in side.split("-")] for side in (before, after))
            assert first[0] - first[1] == second[0] - second[1]


def square(text: str) -> tuple[int, int]:
    return ord(text[0]) - ord("a"), int(text[1:])


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_n_queens_gives_a_queen_that_hits_for_every_square_refused(difficulty: Difficulty) -> None:
    for problem, work in cases("n_queens", difficulty):
        board = problem.question.strip().split("\n")[-8:]
        given = [(line.split().index("Q"), row) for row, line in enumerate(board, 1) if "Q" in line]
        lines = [line.split(" ") for line in work.steps.split("\n")]
        assert sorted(square(text) for text in lines[0] if text) == sorted(given)
        num_empty = 8 - len(given)
        placed: list[tuple[int, int]] = []
        for number, line in enumerate(lines[1:-1]):
            searching = number >= num_empty
            for text in line:
                if text == "-":
                    placed.pop()
                elif "/" in text:
                    tried, hit = (square(part) for part in text.split("/"))
                    assert hit in (placed if searching else given)
                    assert tried[0] == hit[0] or abs(tried[0] - hit[0]) == abs(tried[1] - hit[1])
                elif searching:
                    placed.append(square(text))
        queens = sorted(given + placed, key=lambda queen: queen[1])
        assert [square(text) for text in lines[-1]] == queens
        assert [line.split().index("Q") for line in work.answer.split("\n")] == [column for column, _ in queens]
        for part in work.check.split("; "):
            assert len(set(part.split())) == 8


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_color_cube_states_keep_the_six_colors_and_the_check_agrees(difficulty: Difficulty) -> None:
    for problem, work in cases("color_cube_rotation", difficulty):
        colors = re.findall(r"^- a (\w+) \w+ side$", problem.question, re.MULTILINE)
        *states, last = work.steps.split("\n")
        assert states[0] == f"start: {' '.join(colors)}"
        sides = ["top", "right", "front", "left", "back", "bottom"]
        before = colors
        for state in states[1:]:
            rotation, now = state.split(": ")
            assert sorted(now.split()) == sorted(colors)
            # What came to the top was at the named side, and what was opposite each other still is.
            assert now.split()[0] == before[sides.index(rotation)]
            for one, other in ((0, 5), (1, 3), (2, 4)):
                place = now.split().index(before[one])
                assert {place, now.split().index(before[other])} in ({0, 5}, {1, 3}, {2, 4})
            before = now.split()
        assert len(states) - 1 == len(work.check.split(": ")[0].split(" < ")) - 1
        assert last.split(": ")[1] == work.check.split(": ")[1] == work.answer
