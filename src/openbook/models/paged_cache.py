"""Keys and values of many sequences in blocks of a few tokens each, which block tables put in order.

Shapes: M tokens of a step, B sequences, S tokens that are read of each, K key-value heads, H features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from openbook.models.config import ModelConfig


class BlockPool:
    """What every layer keeps, in tensors [slots + 1, K, H]: token t of block b is in slot b * block_tokens + t.

    The slot behind the others stays zero and stands for tokens that are not there: what is hidden must be finite.
    On a CPU memory is taken when a block is first written.

    Args:
        config: its `cache_layers` say what is kept.
        dtype: of keys and values.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers = config.cache_layers
        self.num_blocks, self.block_tokens, self.device = num_blocks, block_tokens, torch.device(device)
        self.empty_slot = num_blocks * block_tokens
        self._kept = [
            [
                _zeros((self.empty_slot + 1, layer.num_heads, dim), dtype, self.device)
                for dim in (layer.key_dim, layer.value_dim)
                if dim
            ]
            for layer in self.layers
        ]
        self._scratch = [torch.empty(0, dtype=dtype, device=self.device) for _ in range(2)]

    def write(self, layer: int, slots_M: Tensor, tensors: Sequence[Tensor]) -> None:
        """Put `tensors`, keys or keys and values [M, K, H], into slots, int64, each at most once."""
        for kept, new in zip(self._kept[layer], tensors, strict=True):
            kept.index_copy_(0, slots_M, new)

    def read(self, layer: int, rows_BKS: Tensor) -> list[Tensor]:
        """What `write` was given, each [B, S, K, H] with the tokens of a head together, as products want them.

        It stands in memory that the next call uses again: large memory that comes and goes is slow to get.

        Args:
            rows_BKS: int64, of a slot and a head the number slot * K + head.
        """
        rows = rows_BKS.view(-1)
        read = []
        for place, kept in enumerate(self._kept[layer]):
            dim = kept.shape[2]
            if len(self._scratch[place]) < len(rows) * dim:
                self._scratch[place] = kept.new_empty(len(rows) * dim * 5 // 4)
            taken = self._scratch[place][: len(rows) * dim].view(-1, dim)
            torch.index_select(kept.view(-1, dim), 0, rows, out=taken)
            read.append(taken.view(*rows_BKS.shape, dim).transpose(1, 2))
        return read

    def copy(self, source: int, target: int) -> None:
        """Give block `target` what block `source` holds, in all layers.

        Raises:
            ValueError: there is no such block.
        """
        if not 0 <= min(source, target) <= max(source, target) < self.num_blocks:
            raise ValueError(f"cannot copy block {source} to {target}: blocks are 0 to {self.num_blocks - 1}")
        size = self.block_tokens
        for kept in (tensor for tensors in self._kept for tensor in tensors):
            kept[target * size : (target + 1) * size] = kept[source * size : (source + 1) * size]


def block_bytes(config: ModelConfig, block_tokens: int, dtype: torch.dtype) -> int:
    """Memory of one block in all layers of a `BlockPool`."""
    num_values = sum(layer.num_heads * (layer.key_dim + layer.value_dim) for layer in config.cache_layers)
    return num_values * block_tokens * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch would write every page; numpy leaves that to the system.
    memory = np.zeros(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)
