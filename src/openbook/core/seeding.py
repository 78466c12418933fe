"""Seeds that depend on names, never on the order in which things happen to run."""

from __future__ import annotations

import hashlib

# Everything below belongs to evaluation, everything from here on to training.
TRAIN_SEED_START = 1_000_000_000


def derive_seed(base: int, *names: str | int) -> int:
    """A 63-bit seed that is a function of `base` and the path `names`, and of nothing else."""
    text = "/".join(str(part) for part in (base, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
