"""What this machine can do at most: bytes read from memory and products of 8-bit integers, measured here and now."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from openbook.checkpoint.gguf_io import read_gguf
from openbook.checkpoint.model_source import open_model
from openbook.models.sizes import count_parameters
from openbook.ops import _native
from openbook.ops.exact_quant import BLOCK, KIND_BYTES, QuantMatrix

_READ_BYTES = 2**29  # many times the largest cache
_SIZE = 512
_WIDTH = 4096


class Limits(NamedTuple):
    """Of all threads together."""

    read_bytes_per_s: float
    int8_operations_per_s: float

    def tokens_per_s(self, path: Path, num_tokens: int, num_logits: int) -> float:
        """Most tokens/s in steps over `num_tokens` tokens with `num_logits` rows of logits; of a dense GGUF file.

        Every weight is read once a step and multiplied once with each token; attention counts nothing.
        """
        config = open_model(path).config
        size_output = config.vocab_size * config.hidden_size
        counts = count_parameters(config)
        size_layers = counts.total - (1 if config.tie_word_embeddings else 2) * size_output
        read = sum(tensor.num_bytes for name, tensor in read_gguf(path).tensors.items())
        if not config.tie_word_embeddings:
            read -= read_gguf(path).tensors["token_embd.weight"].num_bytes
        operations = 2 * (size_layers * num_tokens + size_output * num_logits)
        return num_tokens / max(read / self.read_bytes_per_s, operations / self.int8_operations_per_s)


def best_of(all_limits: Sequence[Limits]) -> Limits:
    """The best of several measurements: others may have used the machine meanwhile."""
    return Limits(*map(max, zip(*all_limits, strict=True)))


def measure(threads: int) -> Limits:
    """Best of many short attempts of the fastest we know.

    Reading: a search for the largest of many numbers, and our product of a quantised matrix with one vector. Products:
    torch's of 8-bit integers on one thread, times `threads`, as then nobody waits for anybody.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    _native.set_num_threads(threads)
    numbers = torch.ones(_READ_BYTES // 4, dtype=torch.int32)
    search_s = _best_s(numbers.max, 20)
    torch.set_num_threads(1)
    row_bytes = _WIDTH // BLOCK * KIND_BYTES["Q8_0"]
    raw = np.zeros((_READ_BYTES // row_bytes, row_bytes), np.uint8)
    matrix, row = QuantMatrix.from_gguf([raw], "Q8_0", _WIDTH), np.ones((1, _WIDTH), np.float32)
    product_s = _best_s(lambda: matrix.linear(row), 20)
    codes = torch.ones(_SIZE, _SIZE, dtype=torch.int8)
    multiply_s = _best_s(lambda: torch._int_mm(codes, codes), 200)
    torch.set_num_threads(before)
    read = max(_READ_BYTES / search_s, raw.nbytes / product_s)
    return Limits(read, threads * 2 * _SIZE**3 / multiply_s)


def _best_s(work: Callable[[], object], times: int) -> float:
    best_s = float("inf")
    for _ in range(times):
        began_s = time.perf_counter()
        work()
        best_s = min(best_s, time.perf_counter() - began_s)
    return best_s
