"""Sums, expressions, equations, legs and sorting. Multi-digit work is written ones first (see `digits`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import gcd
from typing import Any, ClassVar

from openbook.tasks.base import Difficulty, Problem, Task, Work
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


class NumberSorting(Task):
    """Numbers with the same sign and tens go on one line, in the order asked for; then each line is sorted.

    The ends of the lines are the answer in order; the steps do not write it a second time.
    """

    name = "number_sorting"
    group = "arithmetic"
    summary = "sort decimal numbers"
    hard: ClassVar[Mapping[str, Any]] = {
        "min_numbers": 50,
        "max_numbers": 100,
        "min_decimals": 2,
        "max_decimals": 4,
        "min_value": -500,
        "max_value": 500,
    }

    def work(self, problem: Problem) -> Work:
        metadata = problem.entry["metadata"]
        numbers: list[str] = metadata["original_numbers"]
        is_descending = metadata["direction"] == "descending"
        lines: list[str] = []
        ordered: list[str] = []
        for label in sorted({_tens(number) for number in numbers}, key=_tens_order, reverse=is_descending):
            members = [number for number in numbers if _tens(number) == label]
            line = f"{label}: {' '.join(members)}"
            if len(members) > 1:
                members.sort(key=float, reverse=is_descending)
                line += f" > {' '.join(members)}"
            lines.append(line)
            ordered += members
        answer = str(ordered)
        # Every number of the question with its place in the answer.
        check = " ".join(f"{number}:{ordered.index(number) + 1}" for number in numbers)
        return Work(steps="\n".join(lines), check=check, answer=answer)


def _tens(number: str) -> str:
    """Sign and tens of a decimal number: -95.7 has -9, 3.2 has 0, -3.2 has -0."""
    return ("-" if number.startswith("-") else "") + str(int(number.lstrip("-").partition(".")[0]) // 10)


def _tens_order(label: str) -> tuple[bool, int]:
    return not label.startswith("-"), int(label)


class BasicArithmetic(Task):
    """The innermost bracket first, products before sums, left to right: one operation, then what is left to do."""

    name = "basic_arithmetic"
    group = "arithmetic"
    summary = "evaluate an expression with brackets"
    hard: ClassVar[Mapping[str, Any]] = {"min_terms": 5, "max_terms": 10, "min_digits": 2, "max_digits": 5}

    def generate(self, seed: int, difficulty: Difficulty = "easy", **params: Any) -> Problem:
        from reasoning_gym.arithmetic import basic_arithmetic

        # The package's own walks to the square root: one hard problem in a hundred would take it hours.
        basic_arithmetic.find_common_divisors = common_divisors
        return super().generate(seed, difficulty, **params)

    def work(self, problem: Problem) -> Work:
        parts = drop_brackets(read_expression(problem.entry["metadata"]["expression"]))
        lines, checks = [write_expression(parts)], []
        while len(parts) > 1:
            place = next_operation(parts)
            first, operator, second = parts[place - 1 : place + 2]
            assert isinstance(first, int) and isinstance(operator, str) and isinstance(second, int)
            text, value = apply(first, operator, second)
            lines.append(text)
            checks.append(f"{first}{operator}{second}={value} {cast_out_nines(first, operator, second, value)}")
            parts = drop_brackets([*parts[: place - 1], value, *parts[place + 2 :]])
            lines.append(write_expression(parts))
        return Work(steps="\n".join(lines), check="\n".join(checks), answer=str(parts[0]))


def common_divisors(first: int, second: int) -> list[int]:
    """The common divisors in reasoning-gym's order (1, g, 2, g/2, ...), on which its random choice depends."""
    from sympy import divisors

    ordered: list[int] = divisors(gcd(first, second)) if first or second else []
    half = (len(ordered) + 1) // 2
    pairs = zip(ordered[:half], reversed(ordered), strict=False)
    return [int(number) for low, high in pairs for number in ((low,) if low == high else (low, high))]


Part = int | str  # a number with its sign, an operator, "(", ")" or "-("


def read_expression(expression: str) -> list[Part]:
    """`-( 4 + -9 ) / 5` as `-(`, 4, `+`, -9, `)`, `/`, 5: a minus after an operator belongs to what follows it."""
    parts: list[Part] = []
    for text in re.findall(r"\d+|[-+*/()]", expression):
        has_sign = (
            bool(parts) and parts[-1] == "-" and (len(parts) == 1 or parts[-2] in ("+", "-", "*", "/", "(", "-("))
        )
        if has_sign and text != "-":
            parts[-1] = "-(" if text == "(" else -int(text)
        else:
            parts.append(int(text) if text.isdigit() else text)
    return parts


def write_expression(parts: list[Part]) -> str:
    """The parts without spaces."""
    return "".join(map(str, parts))


def drop_brackets(parts: list[Part]) -> list[Part]:
    """Brackets around a single number go; a minus before them turns its sign."""
    for start in range(len(parts) - 2):
        bracket, number, end = parts[start : start + 3]
        if bracket in ("(", "-(") and isinstance(number, int) and end == ")":
            value = -number if bracket == "-(" else number
            return drop_brackets([*parts[:start], value, *parts[start + 3 :]])
    return parts


def next_operation(parts: list[Part]) -> int:
    """Where the operator stands that is due: the first product, else the first sum, in the first bracket to close."""
    end = parts.index(")") if ")" in parts else len(parts)
    start = max((index for index in range(end) if parts[index] in ("(", "-(")), default=-1) + 1
    for operators in (("*", "/"), ("+", "-")):
        for index in range(start + 1, end, 2):
            if parts[index] in operators:
                return index
    raise AssertionError("a bracket holds an operation: drop_brackets left no single number in one")


def apply(first: int, operator: str, second: int) -> tuple[str, int]:
    """One operation worked out ones first. Division rounds down, as the questions have it."""
    if operator == "+":
        return add(first, second)
    if operator == "-":
        return add(first, -second)
    is_negative = (first < 0) != (second < 0)
    if operator == "*":
        # Fewer partial products with the shorter number second.
        longer, shorter = sorted((abs(first), abs(second)), reverse=True)
        text, size = multiply(longer, shorter)
        return text, -size if is_negative else size
    if abs(second) == 1:
        return f"{ones_first(first)}/1={ones_first(first)}", -abs(first) if is_negative else abs(first)
    text, size, rest = divide(abs(first), abs(second))
    if is_negative and rest:
        down, value = add(-size, -1)
        return f"{text} {down}", value
    return text, -size if is_negative else size


def cast_out_nines(first: int, operator: str, second: int, value: int) -> str:
    """The same operation on the rests by nine; a division as the product it undoes, with what is left over."""
    if operator == "/":
        over = first - second * value
        return f"{second % 9}*{value % 9}" + (f"+{over % 9}" if over else "") + f"={first % 9}"
    return f"{first % 9}{operator}{second % 9}={value % 9}"


TASKS: list[Task] = [ChainSum(), BasicArithmetic(), SimpleEquations(), LegCounting(), NumberSorting()]
