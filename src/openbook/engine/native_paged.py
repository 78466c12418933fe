"""Steps of the native decoder over blocks that sequences share; imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from openbook.core.errors import UserError
from openbook.engine.native_runner import STEP_TOKENS, allocate_cache
from openbook.engine.paged import PagedStep
from openbook.models.config import ModelConfig

if TYPE_CHECKING:
    from openbook.engine.native_runner import NativeRunner


class NativePagedCache:
    """See `PagedCache`; blocks take memory when they are first written."""

    def __init__(self, runner: NativeRunner, config: ModelConfig, num_blocks: int) -> None:
        self._runner, self._vocab_size = runner, config.vocab_size
        self._arrays = allocate_cache(config, num_blocks, runner.cache_kind)

    def forward(self, step: PagedStep) -> NDArray[np.float32]:
        """See `PagedCache.forward`."""
        if any(image is not None for image in step.images):
            raise UserError("this model reads no images: send text only")
        cosines, sines = self._runner.rope(int(step.positions.max()) + 1)
        logits = np.empty((len(step.wanted), self._vocab_size), dtype=np.float32)
        done = 0
        for start in range(0, len(step.token_ids), STEP_TOKENS):
            part = slice(start, start + STEP_TOKENS)
            first, last = np.searchsorted(step.wanted, (start, start + STEP_TOKENS))
            self._runner.decoder.step(
                step.token_ids[part],
                step.positions[part],
                step.sequences[part],
                step.block_tables,
                *self._arrays,
                cosines,
                sines,
                step.wanted[first:last] - np.int32(start),
                logits[done : done + last - first],
            )
            done += last - first
        return logits

    def copy(self, source: int, target: int) -> None:
        """See `PagedCache.copy`."""
        for array in self._arrays:
            array[:, target] = array[:, source]
