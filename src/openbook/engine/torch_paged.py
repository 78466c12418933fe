"""Steps over blocks for any family in `openbook.models`: see `PagedCache`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray

from openbook.engine.paged import BLOCK_TOKENS, PagedStep
from openbook.engine.torch_images import StepImageReader
from openbook.models.base import CausalModel
from openbook.models.layers.lora import ModelAdapters
from openbook.models.paged_cache import BlockPool
from openbook.models.paged_context import PagedContext

# What surrounds a step, by its number of tokens and whether a sequence gets a single one behind others.
Computing = Callable[[int, bool], AbstractContextManager[None]]


class TorchPagedCache:
    """Keys and values of a model in blocks, on its device in its dtype.

    Args:
        computing: entered for each step.
        adapters: those that are loaded beside the model.
    """

    def __init__(
        self, model: CausalModel, num_blocks: int, computing: Computing, adapters: ModelAdapters | None = None
    ) -> None:
        self._adapters = adapters or ModelAdapters(model)
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
        return self._run(step, is_hidden=False)

    @torch.inference_mode()
    def hidden_states(self, step: PagedStep) -> NDArray[np.float32]:
        """See `PagedCache.hidden_states`."""
        return self._run(step, is_hidden=True)

    @torch.inference_mode()
    def copy(self, source: int, target: int) -> None:
        """See `PagedCache.copy`."""
        self._pool.copy(source, target)

    def _run(self, step: PagedStep, is_hidden: bool) -> NDArray[np.float32]:
        context = PagedContext(self._pool, step.positions, step.sequences, step.block_tables)
        with self._computing(len(step.token_ids), context.is_decoding):
            context.images = self._images.read(step, context.shape)
            return self._rows(step, context, is_hidden)

    def _rows(self, step: PagedStep, context: PagedContext, is_hidden: bool) -> NDArray[np.float32]:
        model, device = self._model, self._pool.device
        ids = torch.from_numpy(step.token_ids.astype(np.int64)).view(context.shape).to(device)
        num_wanted = len(step.wanted)
        # No layer is made for no row at all: one is computed where none is asked for, and not projected.
        rows = step.wanted.astype(np.int64) if num_wanted else np.zeros(1, np.int64)
        with self._placed(step, rows):
            hidden_RD = model.hidden_states(ids, context, torch.from_numpy(rows).to(device))
        if num_wanted == 0:
            return np.empty((0, model.config.hidden_size if is_hidden else model.config.vocab_size), np.float32)
        wanted = hidden_RD if is_hidden else model.project(hidden_RD)
        found: NDArray[np.float32] = wanted.float().cpu().numpy()
        return found

    def _placed(self, step: PagedStep, rows: NDArray[np.int64]) -> AbstractContextManager[None]:
        """Around a forward: its products become those of the step's adapters; the last layer is given `rows` alone."""
        return self._adapters.placed(step.adapters, step.sequences.tolist(), rows.tolist())
