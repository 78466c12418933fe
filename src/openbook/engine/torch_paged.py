"""Steps over blocks for any family in `openbook.models`: see `PagedCache`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray

from openbook.core.errors import UserError
from openbook.engine.paged import BLOCK_TOKENS, PagedStep
from openbook.engine.torch_images import StepImageReader
from openbook.models.base import CausalModel
from openbook.models.paged_cache import BlockPool
from openbook.models.paged_context import PagedContext

# What surrounds a step, by its number of tokens and whether a sequence gets a single one behind others.
Computing = Callable[[int, bool], AbstractContextManager[None]]


class TorchPagedCache:
    """Keys and values of a model in blocks, on its device in its dtype.

    Args:
        computing: entered for each step.
    """

    def __init__(self, model: CausalModel, num_blocks: int, computing: Computing) -> None:
        parameter = next(model.parameters())
        self._model, self._computing = model, computing
        self._pool = BlockPool(model.config, num_blocks, BLOCK_TOKENS, parameter.dtype, parameter.device)
        self._images = StepImageReader(model, parameter.dtype, parameter.device)

    @torch.inference_mode()
    def forward(self, step: PagedStep) -> NDArray[np.float32]:
        """See `PagedCache.forward`.

        Raises:
            UserError: an adapter is asked for, or images that the model does not read or that do not fit their prompt.
            ValueError: the arrays do not fit each other or the cache.
        """
        self._apply_adapters(step.adapters)
        context = PagedContext(self._pool, step.positions, step.sequences, step.block_tables)
        with self._computing(len(step.token_ids), context.is_decoding):
            context.images = self._images.read(step, context.shape)
            return self._logits(step, context)

    @torch.inference_mode()
    def copy(self, source: int, target: int) -> None:
        """See `PagedCache.copy`."""
        self._pool.copy(source, target)

    def _logits(self, step: PagedStep, context: PagedContext) -> NDArray[np.float32]:
        model, device = self._model, self._pool.device
        ids = torch.from_numpy(step.token_ids.astype(np.int64)).view(context.shape).to(device)
        num_wanted = len(step.wanted)
        # No layer is made for no row at all: one is computed where none is asked for, and not projected.
        rows = step.wanted.astype(np.int64) if num_wanted else np.zeros(1, np.int64)
        hidden_RD = model.hidden_states(ids, context, torch.from_numpy(rows).to(device))
        if num_wanted == 0:
            return np.empty((0, model.config.vocab_size), np.float32)
        logits: NDArray[np.float32] = model.project(hidden_RD).float().cpu().numpy()
        return logits

    def _apply_adapters(self, adapters: Sequence[str | None]) -> None:
        """Make the step's products those of the adapters, one for each sequence."""
        for name in adapters:
            if name is not None:
                raise UserError(f"adapter {name!r}: this runner has no adapters; ask for the model itself")
