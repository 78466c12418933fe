"""A runner that computes with torch: any family in `openbook.models`, on CPU or CUDA."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from openbook.models.base import CausalModel
from openbook.models.context import CachedContext, DenseContext


class TorchRunner:
    """Wraps a loaded model; keys and values live on its device in its dtype."""

    def __init__(self, model: CausalModel) -> None:
        self._model = model.eval()
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype

    @property
    def max_model_len(self) -> int:
        """See `Runner.max_model_len`."""
        return self._model.config.max_position_embeddings

    def start(self, num_sequences: int, num_tokens: int) -> _TorchBatch:
        """See `Runner.start`."""
        context = CachedContext(self._model.config, num_sequences, num_tokens, self._dtype, self._device)
        return _TorchBatch(self._model, context, self._device)

    @torch.inference_mode()
    def logits(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Runner.logits`."""
        ids_BT = torch.from_numpy(token_ids).to(self._device)
        logits_BTV = self._model(ids_BT, DenseContext(*ids_BT.shape, device=self._device))
        return _to_numpy(logits_BTV)


class _TorchBatch:
    def __init__(self, model: CausalModel, context: CachedContext, device: torch.device) -> None:
        self._model, self._context, self._device = model, context, device

    @torch.inference_mode()
    def forward(self, token_ids: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float32]:
        self._context.append(counts.tolist())
        hidden_BTD = self._model.hidden_states(torch.from_numpy(token_ids).to(self._device), self._context)
        # Only the last real token's row goes through the output projection, the largest matrix of a small model.
        last_B = torch.from_numpy(counts - 1).to(self._device)
        hidden_BD = hidden_BTD[torch.arange(len(counts), device=self._device), last_B]
        return _to_numpy(self._model.project(hidden_BD))

    @torch.inference_mode()
    def keep(self, rows: NDArray[np.int64]) -> None:
        self._context.select(rows.tolist())


def _to_numpy(logits: torch.Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = logits.float().cpu().numpy()
    return values
