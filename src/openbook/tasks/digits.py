"""Written arithmetic for a reader who sees one digit at a time: numbers run ones first, so carries run with the text.

Every function returns the text of the work and the value. In that text 359 is written `953`. A sum lines up with its
terms, so digit k of the result follows from digit k of each term, a fixed distance back, and from the column before.
"""

from __future__ import annotations


def ones_first(number: int, width: int = 1) -> str:
    """The digits of |number| from the ones up, padded with zeros to `width`: 42 in three digits is `240`."""
    return str(abs(number)).zfill(width)[::-1]


def signed(number: int, width: int = 1) -> str:
    """Like `ones_first`, with the sign in front: -42 is `-24`."""
    return ("-" if number < 0 else "") + ones_first(number, width)


def num_digits(number: int) -> int:
    """How many digits |number| has."""
    return len(str(abs(number)))


def add(first: int, second: int) -> tuple[str, int]:
    """A sum with signs: -3643 and 55 give `-3463+5500=-8853`.

    The larger size stands first, so the result has its sign; like signs add the digits, unlike signs subtract them.
    """
    if abs(first) < abs(second):
        first, second = second, first
    total = first + second
    width = num_digits(first)
    return f"{signed(first)}{'-' if second < 0 else '+'}{ones_first(second, width)}={signed(total, width)}", total


def times(number: int, factor: int, plus: int = 0) -> tuple[str, int]:
    """A number times a factor known by heart, plus a number: 356 * 7 gives `653*7 24 93 42 2942`.

    Each column is written ones first: 6*7=42, then 5*7 and the carry 4 is 39, then 24. The product is the first digit
    of each column, and all of the last one. `plus` is the carry into the first column.
    Factor and `plus` are not turned around.
    """
    product = number * factor + plus
    text = f"{ones_first(number)}*{factor}" + (f"+{plus}" if plus else "")
    if number < 10 or (factor < 2 and not plus):
        return f"{text}={ones_first(product)}", product
    carry, columns = plus, []
    for digit in ones_first(number):
        column = int(digit) * factor + carry
        columns.append(ones_first(column, 2))
        carry = column // 10
    return f"{text} {' '.join(columns)} {ones_first(product)}", product


def multiply(first: int, second: int) -> tuple[str, int]:
    """Sizes multiplied digit by digit of the second, ones first; each partial product is shifted and added at once."""
    total, parts = 0, []
    for place, digit in enumerate(ones_first(second)):
        text, product = times(abs(first), int(digit))
        parts.append(text)
        if place:
            text, total = add(product * 10**place, total)
            parts.append(text)
        else:
            total = product
    return " ".join(parts), total


def take_away(number: int, divisor: int) -> tuple[str, int, int]:
    """How often `divisor` goes into `number`, by taking it away: 846 by 356 gives `648-653=094-653=431`.

    Tens, hundreds and so on of the divisor go first, so that no place needs more than nine.
    Returns the text, the quotient and the rest; the text is the number alone where the divisor is the larger.
    """
    width = num_digits(number)
    text, rest = ones_first(number), number
    shift = max(0, width - num_digits(divisor))
    for place in range(shift, -1, -1):
        part = divisor * 10**place
        while rest >= part:
            rest -= part
            text += f"-{ones_first(part, width)}={ones_first(rest, width)}"
    return text, number // divisor, rest


def divide(number: int, divisor: int) -> tuple[str, int, int]:
    """Division with every digit of the quotient after its place: 660 by 44 gives `066-044=022:1 022-440=...:5`.

    Returns the text, the quotient and the rest. The quotient's digits come in the usual order, highest first.
    """
    width = num_digits(number)
    text, rest = ones_first(number), number
    highest = len(str(number // divisor)) - 1
    for place in range(highest, -1, -1):
        part, digit = divisor * 10**place, 0
        while rest >= part:
            rest -= part
            digit += 1
            text += f"-{ones_first(part, width)}={ones_first(rest, width)}"
        text += f":{digit}"
    return text, number // divisor, rest


def remainders(number: int, divisor: int) -> list[int]:
    """The rest after each digit of a short division, highest digit first: 846 by 7 leaves 1, 0, 6."""
    rest, rests = 0, []
    for digit in str(number):
        rest = (10 * rest + int(digit)) % divisor
        rests.append(rest)
    return rests
