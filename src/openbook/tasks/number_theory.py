"""Divisors, primes, bases and bits. Multi-digit work is written ones first (see `digits`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from openbook.tasks.base import Problem, Task, Work
from openbook.tasks.digits import add, multiply, ones_first, remainders, take_away, times_digit


def euclid(first: int, second: int) -> tuple[list[str], list[int], int]:
    """Euclid's algorithm by taking away: the text of each division, the quotients, the greatest common divisor."""
    first, second = max(first, second), min(first, second)
    lines, quotients = [], []
    while second:
        text, quotient, rest = take_away(first, second)
        lines.append(text)
        quotients.append(quotient)
        first, second = second, rest
    return lines, quotients, first


def build_back(quotients: Sequence[int]) -> tuple[list[str], int, int]:
    """Euclid's quotients read backwards from 1 and 0: both numbers divided by their greatest common divisor.

    Each quotient q turns the last two numbers x, y into q*x+y, one digit of q at a time (the continuants; Knuth,
    The Art of Computer Programming, volume 2, section 4.5.3). Returns the text of each step, the smaller, the larger.
    """
    lines, smaller, larger = [], 0, 1
    for quotient in reversed(quotients):
        total, parts = smaller, []
        for place, digit in enumerate(ones_first(quotient)):
            if digit == "0":
                continue
            text, product = times_digit(larger * 10**place, int(digit))
            parts.append(text)
            if total:
                text, total = add(product, total)
                parts.append(text)
            else:
                total = product
        lines.append(" ".join(parts))
        smaller, larger = larger, total
    return lines, smaller, larger


class Gcd(Task):
    """Euclid's algorithm, pair after pair; a division is a row of subtractions."""

    name = "gcd"
    group = "number_theory"
    summary = "the greatest common divisor of numbers"
    hard: ClassVar[Mapping[str, Any]] = {"min_numbers": 3, "max_numbers": 4, "min_value": 1000, "max_value": 10000}

    def work(self, problem: Problem) -> Work:
        numbers: list[int] = problem.entry["metadata"]["numbers"]
        lines, divisor = [], numbers[0]
        for number in numbers[1:]:
            rows, _, divisor = euclid(divisor, number)
            lines += rows
        lines.append(str(divisor))
        # Each number over the divisor leaves nothing.
        check = "\n".join(take_away(number, divisor)[0] for number in numbers)
        return Work(steps="\n".join(lines), check=check, answer=str(divisor))


class Lcm(Task):
    """Euclid, then its quotients read backwards give number / gcd, then one product, pair after pair."""

    name = "lcm"
    group = "number_theory"
    summary = "the least common multiple of numbers"
    hard: ClassVar[Mapping[str, Any]] = {"min_numbers": 3, "max_numbers": 4, "min_value": 1000, "max_value": 10000}

    def work(self, problem: Problem) -> Work:
        numbers: list[int] = problem.entry["metadata"]["numbers"]
        lines, multiple = [], numbers[0]
        for number in numbers[1:]:
            rows, quotients, _ = euclid(multiple, number)
            lines += [f"{row}:{quotient}" for row, quotient in zip(rows, quotients, strict=True)]
            rows, cofactor, _ = build_back(quotients)
            lines += rows
            text, multiple = multiply(max(multiple, number), cofactor)
            lines.append(text)
        lines.append(str(multiple))
        check = "\n".join(take_away(multiple, number)[0] for number in numbers)
        return Work(steps="\n".join(lines), check=check, answer=str(multiple))


class PrimeFactorization(Task):
    """Trial division by the primes in order; the rest after each digit is written, and the quotient where it goes."""

    name = "prime_factorization"
    group = "number_theory"
    summary = "a number as a product of primes"
    hard: ClassVar[Mapping[str, Any]] = {"min_value": 1000, "max_value": 5000}

    def work(self, problem: Problem) -> Work:
        number = rest = int(problem.entry["metadata"]["number"])
        lines, factors, prime = [], [], 2
        while prime * prime <= rest:
            rests = remainders(rest, prime)
            line = f"{rest}/{prime} {' '.join(map(str, rests))}"
            if rests[-1] == 0:
                rest //= prime
                factors.append(prime)
                lines.append(f"{line} ={rest}")
            else:
                lines.append(line)
                prime = next_prime(prime)
        lines.append(f"{rest}<{prime}*{prime}")
        factors.append(rest)
        answer = " × ".join(map(str, factors))
        lines.append(answer)
        # The factors multiplied back, two-digit ones by their digits.
        product, parts = factors[-1], []
        for factor in reversed(factors[:-1]):
            text, product = multiply(product, factor)
            parts.append(text)
        check = "\n".join([*parts, str(product)])
        assert product == number
        return Work(steps="\n".join(lines), check=check, answer=answer)


def next_prime(number: int) -> int:
    """The least prime above `number`."""
    number += 1
    while any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)):
        number += 1
    return number


TASKS: list[Task] = [Gcd(), Lcm(), PrimeFactorization()]
