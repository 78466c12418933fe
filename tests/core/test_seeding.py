"""Seeds are functions of names."""

from __future__ import annotations

import subprocess
import sys

from openbook.core.seeding import derive_seed


def test_seeds_are_what_they_always_were() -> None:
    """These numbers decide the weights of every published model: they may never change."""
    assert derive_seed(7) == 4359823973405836615
    assert derive_seed(7, "order", 3) == 929583480629082613


def test_seeds_differ_by_base_name_and_order_and_fit_63_bits() -> None:
    paths = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "b", "a"), (0, "ab"), (0, "a", 1), (0, "a", 2), (-1,)]
    seeds = [derive_seed(*path) for path in paths]
    assert len(set(seeds)) == len(paths)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_are_the_same_in_another_process() -> None:
    code = "from openbook.core.seeding import derive_seed; print(derive_seed(3, 'weights'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) == derive_seed(3, "weights")
