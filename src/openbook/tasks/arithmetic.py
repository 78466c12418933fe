"""Sums, expressions, equations, legs and sorting. Multi-digit work is written ones first (see `digits`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from openbook.tasks.base import Problem, Task, Work
from openbook.tasks.digits import add, divide, multiply, num_digits, ones_first, signed


class ChainSum(Task):
    """A running total in a fixed number of digits, ones first; below zero it rolls back like an odometer.

    Two digits more than the terms have: the highest is 9 below zero and 0 otherwise, so no step decides on a sign.
    """

    name = "chain_sum"
    group = "arithmetic"
    summary = "add and subtract whole numbers"
    hard: ClassVar[Mapping[str, Any]] = {"min_terms": 5, "max_terms": 8, "min_digits": 4, "max_digits": 6}

    def work(self, problem: Problem) -> Work:
        first, *rest = problem.entry["metadata"]["expression"].split(" ")
        terms = [(sign, int(term)) for sign, term in zip(rest[::2], rest[1::2], strict=True)]
        width = max(num_digits(int(first)), *(num_digits(term) for _, term in terms), 1) + 2
        total = int(first)
        steps = _roll(total, terms, width)
        total += sum(term if sign == "+" else -term for sign, term in terms)
        if total < 0:
            steps += f"\n-{ones_first(total, width)}"
        steps += f"\n{total}"
        # Back from the total, last term first and with the signs turned, to the first term.
        back = [("-" if sign == "+" else "+", term) for sign, term in reversed(terms)]
        return Work(steps=steps, check=_roll(total, back, width), answer=str(total))


def _roll(start: int, terms: list[tuple[str, int]], width: int) -> str:
    """`start`, then sign, term and running total for each term, all in `width` digits, modulo 10**width."""
    total = start % 10**width
    text = ones_first(total, width)
    for sign, term in terms:
        total = (total + term if sign == "+" else total - term) % 10**width
        text += f"{sign}{ones_first(term, width)}={ones_first(total, width)}"
    return text


LEGS: Mapping[str, int] = {
    name: legs
    for legs, names in {
        0: "snake, sea slug, jellyfish, flatworm, leech",
        2: "chicken, bird, human, duck",
        4: "dog, cat, cow, horse, lion, elephant, giraffe, tiger, deer, sheep",
        5: "starfish",
        6: "insect, ant, butterfly, beetle, bee, wasp, grasshopper, cricket, cockroach, praying mantis, firefly",
        8: "spider, scorpion",
        10: "crab, lobster, shrimp",
        14: "woodlouse",
    }.items()
    for name in names.split(", ")
}


class LegCounting(Task):
    """For each animal: count times legs, and the running total, ones first and in a fixed number of digits."""

    name = "leg_counting"
    group = "arithmetic"
    summary = "how many legs a list of animals has"
    hard: ClassVar[Mapping[str, Any]] = {
        "min_animals": 20,
        "max_animals": 30,
        "min_instances": 64,
        "max_instances": 256,
    }

    def work(self, problem: Problem) -> Work:
        animals: dict[str, int] = problem.entry["metadata"]["animals"]
        # Counts above 15 come with more animals: a digit more, and the product by digits instead of by heart.
        is_large = max(animals.values()) > 15 or len(animals) > 10
        width = 4 if is_large else 3
        total, lines = 0, []
        for animal, count in animals.items():
            product = count * LEGS[animal]
            total += product
            # The words of the question, plural and all: copying is easier than rewriting.
            line = f"{count} {animal}{'s' if count > 1 else ''}*{LEGS[animal]}"
            if is_large:
                line += f" {multiply(count, LEGS[animal])[0]} "
            lines.append(f"{line}={ones_first(product, width)} {ones_first(total, width + 1)}")
        # The products again, last animal first, taken from the total until nothing is left.
        left, check = total, ones_first(total, width + 1)
        for animal, count in reversed(animals.items()):
            product = count * LEGS[animal]
            left -= product
            check += f"-{ones_first(product, width + 1)}={ones_first(left, width + 1)}"
        return Work(steps="\n".join([*lines, str(total)]), check=check, answer=str(total))


class SimpleEquations(Task):
    """The constant goes to the other side, then a division place by place."""

    name = "simple_equations"
    group = "arithmetic"
    summary = "solve a linear equation for one variable"
    hard: ClassVar[Mapping[str, Any]] = {
        "min_terms": 3,
        "max_terms": 10,
        "min_value": 10,
        "max_value": 10000,
        "operators_weights": [0.35, 0.35, 0.3],
    }

    def work(self, problem: Problem) -> Work:
        metadata = problem.entry["metadata"]
        variable: str = metadata["variable"]
        factor, constant, right = read_equation(metadata["equation"], variable)
        lines, scaled = [], right
        if constant:
            text, scaled = add(right, -constant)
            lines.append(text)
        text, value, _ = divide(abs(scaled), abs(factor))
        lines += [text, f"{variable}={value}"]
        # The value put back: the factor times it, and the constant, give the right side.
        text, product = multiply(factor, value)
        checks = [text]
        if constant:
            checks.append(add(product if factor > 0 else -product, constant)[0])
        checks.append(signed(right))
        return Work(steps="\n".join(lines), check="\n".join(checks), answer=str(value))


def read_equation(equation: str, variable: str) -> tuple[int, int, int]:
    """`93 - 48*i = -771` as factor, constant and right side: (-48, 93, -771)."""
    left, right = equation.split(" = ")
    factor = constant = 0
    for term in re.findall(r"-?[^-+]+", left.replace(" ", "")):
        if variable in term:
            digits = term.replace(f"*{variable}", "").replace(variable, "1")
            factor += int(digits)
        else:
            constant += int(term)
    return factor, constant, int(right)


TASKS: list[Task] = [ChainSum(), LegCounting(), SimpleEquations()]
