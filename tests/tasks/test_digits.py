"""Written arithmetic, ones first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from true_lines import count_true_equations

from openbook.tasks.digits import add, divide, multiply, ones_first, remainders, signed, take_away, times

NUMBERS = st.integers(min_value=0, max_value=10**8)


def test_the_examples_of_the_docstrings() -> None:
    assert ones_first(42, 3) == "240"
    assert signed(-42) == "-24"
    assert add(-3643, 55) == ("-3463+5500=-8853", -3588)
    assert times(356, 7) == ("653*7 24 93 42 2942", 2492)
    assert times(26, 16, 3) == ("62*16+3 99 14 914", 419)
    assert take_away(846, 356) == ("648-653=094-653=431", 2, 134)
    assert take_away(5, 7) == ("5", 0, 5)
    assert remainders(846, 7) == [1, 0, 6]


def test_division_writes_a_zero_of_the_quotient() -> None:
    assert divide(612, 6) == ("216-006=210:1:0-600=600-600=000:2", 102, 0)
    assert divide(3, 7) == ("3:0", 0, 3)


@given(st.integers(min_value=-(10**9), max_value=10**9), st.integers(min_value=-(10**9), max_value=10**9))
def test_add(first: int, second: int) -> None:
    text, total = add(first, second)
    assert total == first + second
    assert count_true_equations(text) == 1


@given(NUMBERS, NUMBERS)
def test_multiply(first: int, second: int) -> None:
    text, product = multiply(first, second)
    assert product == first * second
    assert count_true_equations(text) >= len(str(second))


@given(NUMBERS, st.integers(min_value=1, max_value=10**5))
def test_divide_and_take_away(number: int, divisor: int) -> None:
    text, quotient, rest = divide(number, divisor)
    assert (quotient, rest) == divmod(number, divisor)
    assert "".join(part[0] for part in text.split(":")[1:]) == str(quotient)
    count_true_equations(text)
    plain, *values = take_away(number, divisor)
    assert values == [quotient, rest]
    assert count_true_equations(plain) == sum(map(int, str(quotient)))
