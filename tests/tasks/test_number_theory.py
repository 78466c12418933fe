"""Worked solutions of number_theory.py: right, the same every time, every line true."""

from __future__ import annotations

import re
from math import gcd, lcm, prod

import pytest
from true_lines import count_true_equations

from openbook.tasks.base import DIFFICULTIES, TRAIN_SEED_START, Difficulty, Task
from openbook.tasks.number_theory import TASKS, build_back, euclid, next_prime, to_decimal

SEEDS = [*range(700_000, 700_170), *range(TRAIN_SEED_START, TRAIN_SEED_START + 30)]
NAMES = {task.name: task for task in TASKS}


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_200_problems_score_one(task: Task, difficulty: Difficulty) -> None:
    for seed in SEEDS:
        problem = task.generate(seed, difficulty)
        work = task.work(problem)
        assert task.score(problem, work.answer) == 1.0, (problem.question, work)
        assert work.steps.splitlines()[-1] == work.answer
        assert work.check
        assert work == task.work(task.generate(seed, difficulty))


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_line_is_true(task: Task, difficulty: Difficulty) -> None:
    for seed in SEEDS[:50]:
        work = task.work(task.generate(seed, difficulty))
        # In short divisions the numbers stand as usual: they have their own test below.
        lines = [line for line in work.reasoning("high").splitlines() if not re.match(r"\d+/\d+ ", line)]
        num_true = sum(count_true_equations(line) for line in lines)
        # Bits and primes are found by short division alone.
        if task.name not in ("count_bits", "prime_factorization"):
            assert num_true > 0


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("name", ["prime_factorization", "base_conversion"])
def test_short_divisions_are_true(name: str, difficulty: Difficulty) -> None:
    num_seen = 0
    for seed in SEEDS[:50]:
        steps = NAMES[name].work(NAMES[name].generate(seed, difficulty)).steps
        for number, divisor, rests, quotient in re.findall(r"^(\d+)/(\d+) ([\d ]+?)(?: =(\d+).*)?$", steps, re.M):
            expected = [int(number[: end + 1]) % int(divisor) for end in range(len(number))]
            assert [int(rest) for rest in rests.split()] == expected
            if quotient:
                assert int(number) // int(divisor) == int(quotient)
            num_seen += 1
    assert num_seen > 100


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_bits_are_counted_in_every_line(difficulty: Difficulty) -> None:
    task = NAMES["count_bits"]
    for seed in SEEDS[:50]:
        *rows, last = task.work(task.generate(seed, difficulty)).steps.splitlines()
        count, following = 0, None
        for row in rows:
            number, rest, total = map(int, row.split())
            assert following in (None, number)
            assert number % 4 == rest
            count += rest.bit_count()
            assert count == total
            following = number // 4
        assert following == 0
        assert int(last) == count


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_primes_are_tried_until_the_square_is_larger(difficulty: Difficulty) -> None:
    task = NAMES["prime_factorization"]
    for seed in SEEDS[:50]:
        problem = task.generate(seed, difficulty)
        steps = task.work(problem).steps
        rest, prime = map(int, re.search(r"^(\d+)<(\d+)\*\2$", steps, re.M).groups())  # type: ignore[union-attr]
        assert rest < prime * prime
        factors = [int(factor) for factor in steps.splitlines()[-1].split(" × ")]
        assert prod(factors) == problem.entry["metadata"]["number"]
        assert all(next_prime(factor - 1) == factor for factor in factors)


@pytest.mark.parametrize("first, second", [(1, 1), (12, 12), (1, 999), (999, 7), (84, 36), (36, 84), (10_000, 1_024)])
def test_euclid_and_back(first: int, second: int) -> None:
    rows, quotients, divisor = euclid(first, second)
    _, smaller, larger = build_back(quotients)
    assert divisor == gcd(first, second)
    assert {smaller * divisor, larger * divisor} == {first, second}
    assert larger * divisor * smaller == lcm(first, second)
    assert all(row.endswith("0") for row in rows[-1:])


def test_a_worked_gcd() -> None:
    rows, quotients, divisor = euclid(846, 356)
    assert rows[:2] == ["648-653=094-653=431", "653-431=222-431=880"]
    assert quotients == [2, 2, 1, 1, 1, 10, 2]
    assert divisor == 2


def test_a_worked_fraction() -> None:
    assert build_back([2, 3]) == (["1*3=3", "3*2=6 6+1=7"], 3, 7)


def test_letters_are_digits_above_nine() -> None:
    assert to_decimal("1f", 16) == (["1 0*16+1=1", "f 1*16+15=13"], 31)
    assert to_decimal("0", 7) == (["0 0*7=0"], 0)


def test_the_smallest_numbers() -> None:
    primes = NAMES["prime_factorization"]
    assert primes.work(primes.generate(0, min_value=2, max_value=2)).steps == "2<2*2\n2"
    bases = NAMES["base_conversion"]
    problem = next(
        problem
        for seed in range(50)
        if (problem := bases.generate(seed, max_value=1)).entry["metadata"]["decimal_value"] == 0
    )
    assert bases.work(problem).answer == "0"
