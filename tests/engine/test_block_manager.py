"""Blocks: who holds them, which prefixes are found again, and that none is ever lost or given twice."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openbook.engine.block_manager import BlockManager, block_digest


def test_a_prefix_is_found_as_far_as_it_is_known() -> None:
    blocks = BlockManager(4)
    digests = [block_digest(b"", [1, 2]), block_digest(b"x", [3, 4]), block_digest(b"y", [5, 6])]
    held = [blocks.allocate() for _ in range(2)]
    for block, digest in zip(held, digests, strict=False):
        assert block is not None
        blocks.remember(block, digest)
    assert blocks.find(digests) == held
    assert blocks.find([digests[1]]) == [held[1]]
    assert blocks.find([digests[2], digests[0]]) == []  # a chain that is broken at its beginning


def test_what_nobody_holds_is_found_until_its_place_is_needed() -> None:
    blocks = BlockManager(2)
    first, second = blocks.allocate(), blocks.allocate()
    assert first is not None and second is not None
    blocks.remember(first, b"first")
    blocks.remember(second, b"second")
    blocks.release(second)
    blocks.release(first)
    assert blocks.num_free == 2
    assert blocks.allocate() == second  # released before the other
    assert blocks.find([b"second"]) == []
    assert blocks.find([b"first"]) == [first]
    assert blocks.allocate() is None


def test_the_same_prefix_computed_twice_stays_known_once() -> None:
    blocks = BlockManager(2)
    first, second = blocks.allocate(), blocks.allocate()
    assert first is not None and second is not None
    blocks.remember(first, b"same")
    blocks.remember(second, b"same")
    blocks.release(second)
    assert blocks.allocate() == second  # it is not kept: the other has it
    assert blocks.find([b"same"]) == [first]


def test_without_a_prefix_cache_nothing_is_found() -> None:
    blocks = BlockManager(1, has_prefix_cache=False)
    block = blocks.allocate()
    assert block is not None
    blocks.remember(block, b"digest")
    assert blocks.find([b"digest"]) == []


def test_forgotten_prefixes_leave_free_blocks() -> None:
    blocks = BlockManager(3)
    block = blocks.allocate()
    assert block is not None
    blocks.remember(block, b"digest")
    blocks.release(block)
    blocks.forget_prefixes()
    assert blocks.find([b"digest"]) == []
    assert {blocks.allocate() for _ in range(3)} == {0, 1, 2}


def test_what_nobody_holds_cannot_be_released() -> None:
    with pytest.raises(ValueError, match="block 0 is released, and nobody holds it"):
        BlockManager(1).release(0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["allocate", "find", "share", "release", "remember"]), st.integers(0, 5))))
def test_no_block_is_lost_or_given_twice(actions: list[tuple[str, int]]) -> None:
    """Any sequence of calls, against a plain count of holders."""
    blocks = BlockManager(4)
    held: Counter[int] = Counter()
    for action, number in actions:
        mine = sorted(held.elements())
        if action == "allocate":
            block = blocks.allocate()
            assert (block is None) == (len(held) == 4)
            if block is not None:
                assert held[block] == 0
                held[block] += 1
        elif action == "find":
            held.update(blocks.find([bytes([number])]))
        elif mine:
            block = mine[number % len(mine)]
            if action == "share":
                blocks.share(block)
                held[block] += 1
            elif action == "release":
                blocks.release(block)
                held[block] -= 1
                held += Counter()  # drop those at zero
            else:
                blocks.remember(block, bytes([number]))
        assert blocks.num_free == 4 - len(held)
        assert all(blocks.is_shared(block) == (count > 1) for block, count in held.items())
