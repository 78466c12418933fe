"""Who holds which block of the key-value cache, and which blocks hold a prefix that another prompt may reuse.

A full block is known by the digest of everything up to its last token, so that equal prefixes share blocks. A block
that nobody holds keeps what it has until it is needed for something else, the longest unused first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of a full block, of what stands before it (`parent`) and of its own tokens."""
    return hashlib.blake2b(parent + np.asarray(token_ids, dtype="<i4").tobytes(), digest_size=16).digest()


class BlockManager:
    """Counts the holders of `num_blocks` blocks and remembers prefixes.

    Args:
        num_blocks: of the cache.
        has_prefix_cache: whether prefixes are found again.
    """

    def __init__(self, num_blocks: int, has_prefix_cache: bool = True) -> None:
        self.num_blocks, self._has_prefix_cache = num_blocks, has_prefix_cache
        self._holders = [0] * num_blocks
        self._empty = deque(range(num_blocks))  # hold nothing that can be reused
        self._reusable: OrderedDict[int, None] = OrderedDict()  # held by nobody, with a known prefix; oldest first
        self._by_digest: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be had now."""
        return len(self._empty) + len(self._reusable)

    def allocate(self) -> int | None:
        """A block for one holder, or None if all are held; what it had is forgotten."""
        if self._empty:
            block = self._empty.popleft()
        elif self._reusable:
            block, _ = self._reusable.popitem(last=False)
            del self._by_digest[self._digests.pop(block)]
        else:
            return None
        self._holders[block] = 1
        return block

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest known beginning of a chain of digests, each with one holder more."""
        found = []
        for digest in digests if self._has_prefix_cache else ():
            block = self._by_digest.get(digest)
            if block is None:
                break
            self.share(block)
            found.append(block)
        return found

    def share(self, block: int) -> None:
        """One holder more."""
        if self._holders[block] == 0:
            del self._reusable[block]
        self._holders[block] += 1

    def release(self, block: int) -> None:
        """One holder less.

        Raises:
            ValueError: nobody holds it.
        """
        if self._holders[block] == 0:
            raise ValueError(f"block {block} is released, and nobody holds it")
        self._holders[block] -= 1
        if self._holders[block] == 0:
            if block in self._digests:
                self._reusable[block] = None
            else:
                self._empty.append(block)

    def is_shared(self, block: int) -> bool:
        """Whether several hold it: it must not be written to."""
        return self._holders[block] > 1

    def remember(self, block: int, digest: bytes) -> None:
        """A held block is now full and computed. If another holds the same already, that one stays the known one."""
        if self._has_prefix_cache and digest not in self._by_digest and block not in self._digests:
            self._by_digest[digest] = block
            self._digests[block] = digest

    def forget_prefixes(self) -> None:
        """No prefix is found again: what the blocks hold is no longer valid."""
        self._by_digest.clear()
        self._digests.clear()
        self._empty.extend(self._reusable)
        self._reusable.clear()
