"""Weights from files into the native decoder, in the form they are stored in; imports no torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from openbook.checkpoint.memory import require_memory
from openbook.checkpoint.model_source import ModelSource
from openbook.checkpoint.raw_matrix import BLOCK_STORAGES, RawMatrix, shared_storage
from openbook.checkpoint.raw_weights import RawWeights
from openbook.core.errors import UserError
from openbook.engine.choices import CacheKind
from openbook.engine.native_runner import NativeRunner, make_decoder
from openbook.models.sizes import rounded_item_bytes
from openbook.ops.native_module import require_native

# Types, by their names in files, that the native core computes on as they are; others are expanded to float32.
KEPT_TYPES = frozenset(("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"))

# Features of a head that a cache of 8 bits rounds together.
CACHE_BLOCK = 32

_FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def load_native(source: ModelSource, cache: CacheKind = "float32") -> NativeRunner:
    """Read the weights of a dense decoder.

    Raises:
        UserError: heads that the cache cannot round, no family that the native core knows, a file is missing or
            damaged, too little memory, or the package has no native core.
    """
    if cache == "int8" and source.config.head_dim % CACHE_BLOCK:
        raise UserError(
            f"the cache int8 rounds {CACHE_BLOCK} features of a head together, this model's heads have "
            f"{source.config.head_dim}: use the cache float32"
        )
    decoder = make_decoder(source.config)
    weights = RawWeights(source)
    cache_item_bytes = rounded_item_bytes(source.config) if cache == "int8" else None
    require_memory(source.path, source.config, kept=KEPT_TYPES, cache_item_bytes=cache_item_bytes)
    for name, parts in weights.items():
        if len(parts[0].shape) == 1:
            decoder.set_vector(name, parts[0].data)
        else:
            decoder.set_matrix(name, pack_matrix(parts))
    return NativeRunner(source.config, decoder, cache)


def pack_matrix(parts: tuple[RawMatrix, ...]) -> Any:
    """A `_native.PackedWeight` or `_native.QuantWeight` of all rows of the parts, top to bottom.

    Parts that are stored in different ways are expanded to float32.
    """
    native = require_native()
    num_rows, num_columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
    storage = shared_storage(parts)
    if storage in BLOCK_STORAGES:
        quantised = native.QuantWeight(storage.upper(), num_rows, num_columns)
        first = 0
        for part in parts:
            quantised.set_rows(first, np.ascontiguousarray(part.data))
            first += part.shape[0]
        return quantised
    arrays = [part.floats() if storage == "f32" else part.data for part in parts]
    rows = np.ascontiguousarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
    return native.PackedWeight(rows.view(np.uint8).reshape(-1), num_rows, num_columns, _FLOATS[storage])
