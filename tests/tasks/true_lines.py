"""Reads worked arithmetic back: every sum and product in it must be true. Numbers in it run ones first."""

from __future__ import annotations

import re


def value(digits: str) -> int:
    """`-24` is -42."""
    return int(digits.lstrip("-")[::-1]) * (-1 if digits.startswith("-") else 1)


def count_true_equations(text: str, *, is_modular: bool = False) -> int:
    """Checks each a+b=c, a-b=c, a*b=c and each product by columns in `text`; returns how many there were.

    With `is_modular` sums are modulo ten to the number of digits of the result.
    """
    num_true = 0
    # Quotient digits stand between the subtractions they count: 066-044=022:1-...
    for chain in re.findall(r"(?<![\d*/+=-])-?\d+(?:[+-]\d+=-?\d+)+", re.sub(r":\d+", "", text)):
        start, *links = re.findall(r"^-?\d+|[+-]\d+=-?\d+", chain)
        for link in links:
            term, result = link.split("=")
            modulus = 10 ** len(result) if is_modular else 10**100
            assert (value(start) + value(term.lstrip("+")) - value(result)) % modulus == 0, (link, text)
            start = result
            num_true += 1
    for first, second, plus, result in re.findall(r"(?<![\d])(\d+)\*(\d+)(\+\d+)?=(\d+)", text):
        assert value(first) * int(second) + int(plus or 0) == value(result), (first, second, plus, result, text)
        num_true += 1
    for first, second, plus, work in re.findall(r"(\d+)\*(\d+)(\+\d+)? (\d\d+(?: \d+)*)", text):
        columns = work.split()
        carry = int(plus or 0)
        assert len(columns) > len(first), (first, columns, text)
        for digit, column in zip(first, columns, strict=False):
            assert int(digit) * int(second) + carry == value(column), (first, second, column, text)
            carry = value(column) // 10
        assert value(columns[len(first)]) == value(first) * int(second) + int(plus or 0), (first, second, text)
        num_true += 1
    return num_true
