"""What the continuous-batching engine asks of a runner: steps over sequences whose keys and values live in blocks.

Shapes: M tokens of a step, S sequences in it, W blocks of the longest, R rows whose logits are wanted, V vocab_size,
D hidden_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from openbook.engine.adapters import AdapterPlace
from openbook.engine.runner import LoadedModel
from openbook.tokenizer.images import ImagePatches

BLOCK_TOKENS = 16  # tokens of a block, in every runner


@dataclass(frozen=True, kw_only=True)
class PromptImages:
    """The images of one sequence of a step, and its whole prompt, which says where they stand."""

    prompt_ids: Sequence[int]
    images: Sequence[ImagePatches]


@dataclass(frozen=True, kw_only=True)
class PagedStep:
    """The tokens that one step appends, those of a sequence together and in order.

    Args:
        token_ids: int32 [M].
        positions: int32 [M], of each token in its sequence, from 0.
        sequences: int32 [M], ascending from 0 to S - 1: rows of `block_tables`.
        block_tables: int32 [S, W], the blocks of each sequence in order; what lies behind its last token is not read.
        wanted: int32 [R], the tokens whose logits are asked for, ascending.
        adapters: the adapter of each sequence, [S]; None is the model as it is. Empty: none has one.
        images: of each sequence, [S], None for one without. Empty: none has any.
    """

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    sequences: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    wanted: NDArray[np.int32]
    adapters: Sequence[str | None] = ()
    images: Sequence[PromptImages | None] = ()


class PagedCache(Protocol):
    """Keys and values of all layers in blocks, of which several sequences may share some."""

    def forward(self, step: PagedStep) -> NDArray[np.float32]:
        """Compute a step, writing keys and values into the blocks: the logits after each wanted token, [R, V].

        What a sequence's logits are does not depend on the others in the step; in the profile exact not in one bit.
        """

    def hidden_states(self, step: PagedStep) -> NDArray[np.float32]:
        """As `forward`, but the final normalised rows, from which logits are made: [R, D]."""

    def copy(self, source: int, target: int) -> None:
        """Give block `target` what block `source` holds."""


@runtime_checkable
class PagedRunner(LoadedModel, Protocol):
    """A model that is ready to compute steps over blocks."""

    @property
    def adapters(self) -> AdapterPlace:
        """Where it keeps adapters."""

    @property
    def block_bytes(self) -> int:
        """Memory of one block."""

    def paged_cache(self, num_blocks: int) -> PagedCache:
        """An empty cache."""
