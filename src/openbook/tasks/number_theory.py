"""Divisors, primes, bases and bits. Multi-digit work is written ones first (see `digits`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any, ClassVar

from openbook.tasks.base import Problem, Task, Work
from openbook.tasks.digits import add, multiply, ones_first, remainders, take_away, times


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
            text, product = times(larger * 10**place, int(digit))
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
        rest = int(problem.entry["metadata"]["number"])
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
        return Work(steps="\n".join(lines), check=check, answer=answer)


def next_prime(number: int) -> int:
    """The least prime above `number`."""
    number += 1
    while any(number % divisor == 0 for divisor in range(2, isqrt(number) + 1)):
        number += 1
    return number


class CountBits(Task):
    """Fourths of the number, the rest (two bits) and the running count; each digit needs only the three above it."""

    name = "count_bits"
    group = "number_theory"
    summary = "the number of ones in a number's binary digits"
    hard: ClassVar[Mapping[str, Any]] = {"min_n": 1000000, "max_n": 100000000}

    def work(self, problem: Problem) -> Work:
        number: int = problem.entry["metadata"]["number"]
        count, lines, check = 0, [], []
        while number:
            number, rest = number // 4, number % 4
            count += rest.bit_count()
            lines.append(f"{4 * number + rest} {rest} {count}")
            # Four times the fourth and the rest is the number again.
            check.append(times(number, 4, rest)[0])
        return Work(steps="\n".join([*lines, str(count)]), check="\n".join(check), answer=str(count))


DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def to_decimal(digits: str, base: int) -> tuple[list[str], int]:
    """The lines and the value of digits in a base: value * base + next digit, highest first (Horner)."""
    lines, value = [], 0
    for digit in digits:
        text, value = times(value, base, DIGITS.index(digit))
        lines.append(f"{digit} {text}")
    return lines, value


class BaseConversion(Task):
    """To decimal by Horner, then short division by the target base; its rests are the digits, ones first."""

    name = "base_conversion"
    group = "number_theory"
    summary = "a number from one base to another"
    hard: ClassVar[Mapping[str, Any]] = {"min_base": 9, "max_base": 18, "min_value": 10000, "max_value": 100000}

    def work(self, problem: Problem) -> Work:
        metadata = problem.entry["metadata"]
        source, target = metadata["source_base"], metadata["target_base"]
        lines: list[str] = []
        if source == 10:
            value = int(metadata["source_repr"])
        else:
            lines, value = to_decimal(metadata["source_repr"], source)
        if target == 10:
            answer = str(value)
        else:
            answer, left = "", value
            while left or not answer:
                rests = remainders(left, target)
                answer = DIGITS[rests[-1]] + answer
                line = f"{left}/{target} {' '.join(map(str, rests))}"
                left //= target
                lines.append(f"{line} ={left}:{answer[0]}")
        lines.append(answer)
        # The answer back to decimal, or decimal back to the source, whichever the steps have not done.
        base, digits = (source, metadata["source_repr"]) if target == 10 else (target, answer)
        back, _ = to_decimal(digits, base)
        return Work(steps="\n".join(lines), check="\n".join([*back, str(value)]), answer=answer)


class FractionSimplification(Task):
    """Euclid, then its quotients read backwards: the last two numbers are the fraction in lowest terms."""

    name = "fraction_simplification"
    group = "number_theory"
    summary = "a fraction in lowest terms"
    hard: ClassVar[Mapping[str, Any]] = {"min_value": 100, "max_value": 1000, "min_factor": 10, "max_factor": 100}

    def work(self, problem: Problem) -> Work:
        metadata = problem.entry["metadata"]
        numerator, denominator = metadata["numerator"], metadata["denominator"]
        rows, quotients, divisor = euclid(numerator, denominator)
        lines = [f"{row}:{quotient}" for row, quotient in zip(rows, quotients, strict=True)]
        rows, smaller, larger = build_back(quotients)
        top, bottom = (smaller, larger) if numerator <= denominator else (larger, smaller)
        style: str = metadata["style"]
        if style in ("latex_frac", "latex_dfrac"):
            answer = f"$\\{style.removeprefix('latex_')}{{{top}}}{{{bottom}}}$"
        else:
            answer = f"${top}/{bottom}$" if style == "latex_inline" else f"{top}/{bottom}"
        # Both times the divisor give the fraction of the question.
        check = "\n".join(multiply(part, divisor)[0] for part in (top, bottom))
        return Work(steps="\n".join([*lines, *rows, answer]), check=check, answer=answer)


TASKS: list[Task] = [Gcd(), Lcm(), PrimeFactorization(), CountBits(), BaseConversion(), FractionSimplification()]
