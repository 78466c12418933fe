"""Worked solutions for games: rewriting, queens, a cube."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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


class NQueens(Task):
    """Squares as in chess, column letter and row number. First the queens that stand. Then each empty row: the squares
    of the free columns, each with the queen that hits it on a diagonal (a1/c3). Then the search, rows with the fewest
    safe squares first: one line a visit, with the squares tried in order, each with the new queen that hits it, up to
    the first safe one. A row without one (-) sends the search back to the row before, which goes on behind the square
    it had. The last line has all queens by row.
    """

    name = "n_queens"
    group = "games"
    summary = "complete a board with queens that do not attack each other"
    hard: ClassVar[Mapping[str, Any]] = {"n": 8, "min_remove": 4, "max_remove": 6}

    def work(self, problem: Problem) -> Work:
        board: list[list[str]] = problem.entry["metadata"]["puzzle"]
        size = len(board)
        queens = [(row, line.index("Q")) for row, line in enumerate(board) if "Q" in line]
        lines = [" ".join(_square(*queen) for queen in queens)]
        taken = {column for _, column in queens}
        safe: dict[int, list[int]] = {}
        for row in sorted(set(range(size)) - {row for row, _ in queens}):
            hits = {column: _diagonal_hit(queens, row, column) for column in range(size) if column not in taken}
            lines.append(" ".join(_tried(row, column, hit) for column, hit in hits.items()))
            safe[row] = [column for column, hit in hits.items() if hit is None]
        order = sorted(safe, key=lambda row: len(safe[row]))
        placed, search = _search(order, safe)
        solution = dict(sorted([*queens, *placed]))
        lines += [*search, " ".join(_square(*queen) for queen in solution.items())]
        answer = "\n".join(" ".join("Q" if solution[row] == c else "_" for c in range(size)) for row in range(size))
        # A diagonal is a sum or a difference of row and column: sorted, no two are alike. Nor are two columns.
        checks = (
            [_name(column) for column in sorted(solution.values())],
            [str(total) for total in sorted(row + column for row, column in solution.items())],
            [str(difference) for difference in sorted(row - column for row, column in solution.items())],
        )
        return Work(steps="\n".join(lines), check="; ".join(map(" ".join, checks)), answer=answer)


def _search(order: Sequence[int], safe: Mapping[int, Sequence[int]]) -> tuple[list[tuple[int, int]], list[str]]:
    """Fill the rows in order, each from its safe columns, with backtracking: squares (row, column); a line a visit."""
    placed: list[tuple[int, int]] = []
    lines: list[str] = []
    behind = -1  # columns up to it were tried in the row at hand
    while len(placed) < len(order):
        row = order[len(placed)]
        tries: list[str] = []
        found = None
        for column in (column for column in safe[row] if column > behind):
            hit = next((queen for queen in placed if queen[1] == column), None) or _diagonal_hit(placed, row, column)
            tries.append(_tried(row, column, hit))
            if hit is None:
                found = (row, column)
                break
        lines.append(" ".join([*tries, *([] if found else "-")]))
        if found:
            placed.append(found)
            behind = -1
        else:
            behind = placed.pop()[1]
    return placed, lines


def _diagonal_hit(queens: Sequence[tuple[int, int]], row: int, column: int) -> tuple[int, int] | None:
    """The first queen on a diagonal of the square."""
    return next((queen for queen in queens if abs(queen[0] - row) == abs(queen[1] - column)), None)


def _tried(row: int, column: int, hit: tuple[int, int] | None) -> str:
    return _square(row, column) + (f"/{_square(*hit)}" if hit else "")


def _square(row: int, column: int) -> str:
    return f"{_name(column)}{row + 1}"


_SIDES = ("top", "right", "front", "left", "back", "bottom")
# Side that comes to the top: for each side, the side whose colour it takes.
_TAKES: dict[str, dict[str, str]] = {
    "front": {"top": "front", "front": "bottom", "bottom": "back", "back": "top"},
    "right": {"top": "right", "right": "bottom", "bottom": "left", "left": "top"},
    "back": {"top": "back", "back": "bottom", "bottom": "front", "front": "top"},
    "left": {"top": "left", "left": "bottom", "bottom": "right", "right": "top"},
    "bottom": {"top": "bottom", "bottom": "top", "front": "back", "back": "front"},
}


class ColorCubeRotation(Task):
    """One line a rotation: the side that comes to the top, then the six colours in the order of the question
    (top, right, front, left, back, bottom). The last line names the side asked for.
    """

    name = "color_cube_rotation"
    group = "games"
    summary = "follow the colours of a cube through rotations"
    hard: ClassVar[Mapping[str, Any]] = {"min_rotations": 10, "max_rotations": 50}

    def work(self, problem: Problem) -> Work:
        metadata = problem.entry["metadata"]
        start: dict[str, str] = metadata["initial_state"]
        target: str = metadata["target_side"]
        colors = {side: start[side] for side in _SIDES}
        lines = [_row("start", colors)]
        for rotation in metadata["rotations"]:
            takes = _TAKES[rotation]
            colors = {side: colors[takes.get(side, side)] for side in _SIDES}
            lines.append(_row(rotation, colors))
        answer = colors[target]
        lines.append(f"{target}: {answer}")
        # The same from the end: where was this side before each rotation, back to the start?
        path = [target]
        for rotation in reversed(metadata["rotations"]):
            path.append(_TAKES[rotation].get(path[-1], path[-1]))
        return Work(steps="\n".join(lines), check=f"{' < '.join(path)}: {start[path[-1]]}", answer=answer)


def _row(label: str, colors: Mapping[str, str]) -> str:
    return f"{label}: {' '.join(colors[side] for side in _SIDES)}"


TASKS: list[Task] = [AB(), NQueens(), ColorCubeRotation()]
