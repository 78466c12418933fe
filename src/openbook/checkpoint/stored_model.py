"""Dense decoders in torch whose quantised matrices stay as they are stored: the native runner must agree with them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from openbook.checkpoint.model_source import ModelSource
from openbook.checkpoint.raw_matrix import BLOCK_STORAGES, RawMatrix, shared_storage
from openbook.checkpoint.raw_weights import RawWeights
from openbook.models.base import CausalModel
from openbook.models.registry import build_model
from openbook.ops.base import Ops
from openbook.ops.exact_quant import QuantMatrix


def load_stored_model(source: ModelSource, ops: Ops) -> CausalModel:
    """Load a model of one of `RAW_FAMILIES`, float32 on the CPU but for matrices in Q8_0, Q4_0 and Q4_1.

    These are `QuantMatrix` objects in the place of parameters; parts of one matrix that are stored in different ways
    are expanded to float32.

    Args:
        ops: a backend that multiplies by a `QuantMatrix`: `ExactOps`.

    Raises:
        UserError: a file is missing or damaged, or weights and configuration do not fit.
    """
    model = build_model(source.config, ops, device="meta")
    for name, parts in RawWeights(source).items():
        owner, attribute = name.rsplit(".", 1)
        module = model.get_submodule(owner)
        delattr(module, attribute)
        setattr(module, attribute, _weight(parts))
    return model


def _weight(parts: tuple[RawMatrix, ...]) -> nn.Parameter | QuantMatrix:
    storage = shared_storage(parts)
    if storage in BLOCK_STORAGES:
        return QuantMatrix.from_gguf([part.data for part in parts], storage.upper(), parts[0].shape[1])
    rows = np.concatenate([part.floats() for part in parts])
    return nn.Parameter(torch.from_numpy(rows), requires_grad=False)
