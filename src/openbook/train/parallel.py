"""Data-parallel training in the exact profile: 1, 2, 4 or 8 processes give the same bits.

    torchrun --nproc-per-node 2 -m openbook.cli.main build recipes/nano.toml --out runs/nano

A step's micro-batches are the leaves of one binary tree of additions (`tree_sum.py`). Worker w computes the leaves
[w S, (w + 1) S), S a power of two: a whole subtree. Then workers at distance 1, 2, 4, ... add their sums pairwise, and
the total goes back to all, who make the same update. The first worker makes and writes everything else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from openbook.core.errors import UserError
from openbook.train.tree_sum import add_lists

# While the first worker makes data or scores the model, the others wait; one that ends is noticed at once all the same.
_TIMEOUT = timedelta(days=30)


class LostWorkerError(UserError):
    """Another process of the same training has ended."""


@dataclass(frozen=True)
class Workers:
    """The processes that train together. rank: of this one, from 0. count: a power of two."""

    rank: int = 0
    count: int = 1

    def leaves(self, num_leaves: int) -> range:
        """Which of the leaves 0 to `num_leaves` - 1 are this worker's; with few leaves the last workers have none."""
        share = self._share(num_leaves)
        return range(min(self.rank * share, num_leaves), min((self.rank + 1) * share, num_leaves))

    def total(self, own: Sequence[Tensor], like: Sequence[Tensor], num_leaves: int) -> list[Tensor]:
        """The sum over all workers, the same bits for each of them.

        Args:
            own: sums over this worker's leaves, float32; [] if it has none.
            like: tensors of the same shapes.

        Raises:
            LostWorkerError: another worker has ended.
        """
        if self.count == 1:
            return list(own)
        flat = torch.cat([tensor.flatten() for tensor in own or like])
        has_leaves = [rank * self._share(num_leaves) < num_leaves for rank in range(self.count)]
        other = torch.empty_like(flat)
        distance = 1
        while distance < self.count:
            place = self.rank % (2 * distance)
            if place == distance and has_leaves[self.rank]:
                _call(dist.send, flat, self.rank - distance)
            elif place == 0 and has_leaves[self.rank + distance]:
                _call(dist.recv, other, self.rank + distance)
                flat = add_lists([flat], [other])[0]
            distance *= 2
        _call(dist.broadcast, flat, 0)
        parts = torch.split(flat, [tensor.numel() for tensor in like])
        return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]

    def tell(self, message: Any) -> None:
        """From the first worker to all others, who wait in `hear`; does nothing alone.

        Raises:
            LostWorkerError: another worker has ended.
        """
        if self.count > 1:
            _call(dist.broadcast_object_list, [message], 0)

    def hear(self) -> Any:
        """What the first worker says next.

        Raises:
            LostWorkerError: another worker has ended.
        """
        box: list[Any] = [None]
        _call(dist.broadcast_object_list, box, 0)
        return box[0]

    def _share(self, num_leaves: int) -> int:
        share = 1
        while share * self.count < num_leaves:
            share *= 2
        return share


ALONE = Workers()


def workers_of_environment() -> Workers:
    """What torchrun says of this process; one worker alone without it."""
    return Workers(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def joined() -> Iterator[Workers]:
    """Connect with the other processes that torchrun started; they learn at once when this one leaves.

    Raises:
        UserError: their number is not a power of two. LostWorkerError: another one has ended.
    """
    workers = workers_of_environment()
    if workers.count == 1:
        yield workers
        return
    if workers.count & (workers.count - 1):
        if workers.rank > 0:
            raise SystemExit(2)  # the first process says why
        raise UserError(
            f"torchrun started {workers.count} processes, expected a power of two: give --nproc-per-node 1, 2, 4 or 8"
        )
    _call(dist.init_process_group, "gloo", timeout=_TIMEOUT)
    try:
        yield workers
    finally:
        dist.destroy_process_group()


def _call(function: Any, *arguments: Any, **options: Any) -> None:
    try:
        function(*arguments, **options)
    except RuntimeError as error:  # what gloo raises when a connection closes
        raise LostWorkerError(
            "a process of this training ended before the others: its own message says why; correct that and run the "
            "command again (a build with --resume)"
        ) from error
