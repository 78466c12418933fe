"""Worked solutions of arithmetic.py: right, the same every time, every line true."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from true_lines import count_true_equations, value

from openbook.tasks.arithmetic import (
    LEGS,
    TASKS,
    apply,
    cast_out_nines,
    common_divisors,
    drop_brackets,
    next_operation,
    read_equation,
    read_expression,
    write_expression,
)
from openbook.tasks.base import DIFFICULTIES, TRAIN_SEED_START, Difficulty, Task

SEEDS = [*range(700_000, 700_170), *range(TRAIN_SEED_START, TRAIN_SEED_START + 30)]
NAMES = {task.name: task for task in TASKS}


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_200_problems_score_one(task: Task, difficulty: Difficulty) -> None:
    for seed in SEEDS:
        problem = task.generate(seed, difficulty)
        work = task.work(problem)
        assert task.score(problem, work.answer) == 1.0, (problem.question, work)
        last = work.steps.splitlines()[-1]
        if task.name == "number_sorting":
            # The answer is the ends of all lines, and is not written twice.
            ends = [re.split("> |: ", line)[-1] for line in work.steps.splitlines()]
            assert str(" ".join(ends).split(" ")) == work.answer
        else:
            assert last.endswith(work.answer)
        assert work.check
        assert work == task.work(task.generate(seed, difficulty))


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("name", ["chain_sum", "simple_equations", "leg_counting"])
def test_every_line_is_true(name: str, difficulty: Difficulty) -> None:
    for seed in SEEDS[:50]:
        work = NAMES[name].work(NAMES[name].generate(seed, difficulty))
        # In leg_counting the name stands inside the product; the products are read in a test of their own.
        text = re.sub(r"^\d+ [a-z ]+\*", "", work.reasoning("high"), flags=re.M) if name == "leg_counting" else None
        num_true = sum(
            count_true_equations(line, is_modular=name == "chain_sum")
            for line in (text or work.reasoning("high")).splitlines()
        )
        assert num_true > 0


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_chain_sum_checks_its_way_back(difficulty: Difficulty) -> None:
    task = NAMES["chain_sum"]
    for seed in SEEDS[:50]:
        work = task.work(task.generate(seed, difficulty))
        chain = work.steps.splitlines()[0]
        assert work.check.startswith(chain.rpartition("=")[2])
        assert chain.startswith(work.check.rpartition("=")[2])


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_leg_counting_adds_up_line_by_line(difficulty: Difficulty) -> None:
    task = NAMES["leg_counting"]
    for seed in SEEDS[:50]:
        problem = task.generate(seed, difficulty)
        *lines, last = task.work(problem).steps.splitlines()
        total = 0
        for line in lines:
            match = re.fullmatch(r"((\d+) ([a-z ]+))\*(\d+)(?: .*)?=(\d+) (\d+)", line)
            assert match is not None, line
            words, count, name, legs, product, running = match.groups()
            assert f" {words}," in problem.question.replace("?", ",")
            assert LEGS[name.removesuffix("s") if count != "1" else name] == int(legs)
            assert int(count) * int(legs) == value(product)
            total += int(count) * int(legs)
            assert value(running) == total
        assert int(last) == total


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_basic_arithmetic_keeps_its_value_in_every_line(difficulty: Difficulty) -> None:
    task = NAMES["basic_arithmetic"]
    for seed in SEEDS[:50]:
        problem = task.generate(seed, difficulty)
        work = task.work(problem)
        lines = work.steps.splitlines()
        for expression in lines[::2]:
            assert str(eval(expression.replace("/", "//"))) == work.answer == problem.entry["answer"], expression
        for line in lines[1::2]:
            count_true_equations(line)
        for line in work.check.splitlines():
            nines = line.split(" ")[1]
            left, right = nines.split("=")
            assert (eval(left) - int(right)) % 9 == 0, line


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_sorting_keeps_each_number_and_its_place(difficulty: Difficulty) -> None:
    task = NAMES["number_sorting"]
    for seed in SEEDS[:50]:
        problem = task.generate(seed, difficulty)
        work = task.work(problem)
        answer = [text.strip("' []") for text in work.answer.split(",")]
        places = [part.split(":") for part in work.check.split(" ")]
        assert [number for number, _ in places] == problem.entry["metadata"]["original_numbers"]
        assert all(answer[int(place) - 1] == number for number, place in places)
        for line in work.steps.splitlines():
            label, _, members = line.partition(": ")
            tens = abs(int(label)) * 10
            for number in re.findall(r"-?\d+\.\d+", members):
                assert number.startswith("-") == label.startswith("-")
                assert tens <= abs(float(number)) < tens + 10


def test_the_legs_are_those_of_the_package() -> None:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    assert dict(LEGS) == ANIMALS


def test_a_total_below_zero_rolls_back() -> None:
    task = NAMES["chain_sum"]
    problem = task.generate(1001)
    assert problem.entry["metadata"]["expression"] == "21 - 81"
    work = task.work(problem)
    assert work.steps == "1200-1800=0499\n-0600\n-60"
    assert work.check == "0499+1800=1200"


@pytest.mark.parametrize(
    "equation, parts",
    [
        ("44*i + 52 = 712", (44, 52, 712)),
        ("93 - 48*i = -771", (-48, 93, -771)),
        ("-39*i - 55 = -3643", (-39, -55, -3643)),
        ("i + 5 = 9", (1, 5, 9)),
        ("5 - i = 2", (-1, 5, 2)),
        ("-7*i = -14", (-7, 0, -14)),
    ],
)
def test_equations_are_read(equation: str, parts: tuple[int, int, int]) -> None:
    assert read_equation(equation, "i") == parts


@pytest.mark.parametrize(
    "expression, parts",
    [
        ("-( 4 + -9 ) / 5", ["-(", 4, "+", -9, ")", "/", 5]),
        ("-5 - -( -2 )", [-5, "-", "-(", -2, ")"]),
        ("( -( 3 ) ) - 3", ["(", "-(", 3, ")", ")", "-", 3]),
        ("7 - 3 - -2", [7, "-", 3, "-", -2]),
    ],
)
def test_expressions_are_read(expression: str, parts: list[int | str]) -> None:
    assert read_expression(expression) == parts
    assert write_expression(parts) == expression.replace(" ", "")


def test_brackets_around_one_number_go() -> None:
    assert drop_brackets(["-(", "(", 3, ")", ")", "*", "-(", -2, ")"]) == [-3, "*", 2]


def test_products_go_before_sums_and_inner_brackets_before_outer() -> None:
    assert next_operation([1, "+", 2, "*", 3]) == 3
    assert next_operation(["(", 1, "*", "(", 2, "-", 3, ")", ")"]) == 5


@given(st.integers(-(10**6), 10**6), st.sampled_from("+-*/"), st.integers(-(10**4), 10**4))
def test_operations_are_those_of_python_with_division_rounded_down(first: int, operator: str, second: int) -> None:
    if operator == "/" and second == 0:
        return
    text, result = apply(first, operator, second)
    assert result == {"+": first + second, "-": first - second, "*": first * second}.get(operator) or (
        operator == "/" and result == first // second
    )
    assert text
    left, right = cast_out_nines(first, operator, second, result).split("=")
    assert (eval(left) - int(right)) % 9 == 0


@given(st.integers(-5000, 5000), st.integers(-5000, 5000))
def test_common_divisors_come_in_the_order_of_the_package(first: int, second: int) -> None:
    number, expected = 1, []
    for number in range(1, 5001):
        if all(other % number == 0 for other in (first, second)) and (first or second):
            expected.append(number)
    ordered = common_divisors(first, second)
    assert sorted(ordered) == expected
    assert all(low * high == max(expected) for low, high in zip(ordered[::2], ordered[1::2], strict=False))


def test_a_problem_the_package_would_walk_hours_for() -> None:
    task = NAMES["basic_arithmetic"]
    problem = task.generate(1144, "hard")
    assert task.score(problem, task.work(problem).answer) == 1.0
