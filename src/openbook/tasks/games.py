"""Worked solutions for games: rewriting, queens, a cube."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from openbook.tasks.base import Problem, Task, Work


class AB(Task):
    """Every `#A` meets, from the right, the tokens that still look at it: it passes `B#` and falls with the last `A#`;
    if there is none it moves to the far left (<). So A and B never mix: each letter has its own pile of waiting tokens.

    The tokens get names (a b c ...). Each step is name, token, and the pile of its letter afterwards (- when empty).
    What moved left, in order, and then what waits, in order of the names, is the result.

    A# B# #A #A: a A# a, b B# b, c #A -, d #A < / d #A b B#
    """

    name = "ab"
    group = "games"
    summary = "rewrite a program of the A::B system to its final state"
    hard: ClassVar[Mapping[str, Any]] = {"length": 25}

    def work(self, problem: Problem) -> Work:
        match = re.search(r"following program:\n\n(.*)\n\nReturn", problem.question)
        assert match is not None
        program = match[1].split()
        piles: dict[str, list[int]] = {"A": [], "B": []}
        moved: list[int] = []
        walk: list[str] = []
        for index, token in enumerate(program):
            pile = piles[token.strip("#")]
            if token.endswith("#"):
                pile.append(index)
            elif pile:
                pile.pop()
            else:
                moved.append(index)
            after = " ".join(map(_name, pile)) or ("<" if index in moved else "-")
            walk.append(f"{_name(index)} {token} {after}")
        rest = moved + sorted(piles["A"] + piles["B"])
        result = [program[index] for index in rest]
        # Tokens fall in pairs of one letter: the surplus of each letter is the same before and after.
        check = ", ".join(
            f"{x}# {program.count(x + '#')}-{program.count('#' + x)}={result.count(x + '#')}-{result.count('#' + x)}"
            for x in "AB"
        )
        final = " ".join(f"{_name(index)} {program[index]}" for index in rest) or "-"
        return Work(steps=f" {', '.join(walk)}\n {final}", check=check, answer=" ".join(result))


def _name(index: int) -> str:
    """a b ... z aa ab ...: a name is one token, and names can be put in order."""
    letter = chr(ord("a") + index % 26)
    return letter if index < 26 else _name(index // 26 - 1) + letter


TASKS: list[Task] = [AB()]
