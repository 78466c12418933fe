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
        self._runner = runner
        self._vocab_size, self._hidden_size = config.vocab_size, config.hidden_size
        self._arrays = allocate_cache(config, num_blocks, runner.cache_kind)

    def forward(self, step: PagedStep) -> NDArray[np.float32]:
        """See `PagedCache.forward`."""
        return self._run(step, self._vocab_size)

    def hidden_states(self, step: PagedStep) -> NDArray[np.float32]:
        """See `PagedCache.hidden_states`."""
        return self._run(step, self._hidden_size, is_hidden=True)

    def _run(self, step: PagedStep, row_size: int, is_hidden: bool = False) -> NDArray[np.float32]:
        if any(image is not None for image in step.images):
            raise UserError("this model reads no images: send text only")
        adapters = self._runner.adapters.of_sequences(step.adapters)
        cosines, sines = self._runner.rope(int(step.positions.max()) + 1)
        rows = np.empty((len(step.wanted), row_size), dtype=np.float32)
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
                rows[done : done + last - first],
                adapters,
                is_hidden,
            )
            done += last - first
        return rows

    def copy(self, source: int, target: int) -> None:
        """See `PagedCache.copy`."""
        for array in self._arrays:
            array[:, target] = array[:, source]
