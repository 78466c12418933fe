"""Sums whose order of additions is one fixed binary tree, so that parts of it may be added up elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TreeSum:
    """Adds up what the leaves 0, 1, 2, ... give, each a list of tensors of the same shapes.

    A node is left + right over a range of leaves that a power of two divides: leaf 0 with 1, 2 with 3, then 0..1 with
    2..3, and so on; a right child without leaves is left out. The whole sum takes as many partial sums as the number of
    leaves has binary digits.
    """

    def __init__(self) -> None:
        # (leaves below, sum), widths falling from left to right, as the digits of a binary counter.
        self._parts: list[tuple[int, list[Tensor]]] = []

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Put in the next leaf."""
        width, tensors = 1, list(tensors)
        while self._parts and self._parts[-1][0] == width:
            tensors = add_lists(self._parts.pop()[1], tensors)
            width *= 2
        self._parts.append((width, tensors))

    def total(self) -> list[Tensor]:
        """The sum of all leaves so far; [] if there are none."""
        parts = [tensors for _, tensors in self._parts]
        if not parts:
            return []
        total = parts.pop()
        while parts:
            total = add_lists(parts.pop(), total)
        return total


def add_lists(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """left + right, tensor by tensor: one IEEE addition for each element."""
    return list(torch._foreach_add(list(left), list(right)))
