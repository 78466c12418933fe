"""One hash for a whole training state, written down so that anyone can compute it with SHA-256 and no code of ours.

A state is a set of named values. Each value is one leaf, and each leaf is these bytes, one part after the other:

    name, 0x00, kind, 0x00, shape, 0x00, data

- A tensor: `kind` is its safetensors dtype ("F32", "I64", "U8", ...), `shape` its sizes in decimal with commas between
  them ("1024,128"; empty for a scalar), `data` its elements in row-major order, each little-endian.
- A text: `kind` is "text", `shape` is empty, `data` is UTF-8. Integers are decimal; floats as C's printf("%a") writes
  a double.

Leaves are sorted by the bytes of their names. The tree is that of RFC 6962, section 2.1: SHA-256(0x00 leaf) for one
leaf, and SHA-256(0x01 left right) for n > 1 leaves, where left is the tree over the first k leaves, right that over the
rest, and k is the largest power of two below n. The first byte keeps a leaf from passing for an inner node. No leaves
at all is SHA-256 of nothing.

The leaves of a state are:

- `weights/NAME`: the float32 master weights;
- `optimizer/NAME`: every moment, `num_updates`, and `random_state`, the state of torch's generator;
- `position/stage`, `position/step`, `position/stage_step`, `position/best_loss`, `position/mean_loss` and, for each
  entry of the data cursor, `position/cursor/KEY`: texts.

The root of the weights alone has the leaves `weights/NAME` and no others, so that the weights of a release can be held
against a ledger without the optimizer's moments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from openbook.core.hex_float import hex_float

if TYPE_CHECKING:
    from torch import Tensor

    from openbook.checkpoint.train_state import TrainPosition


@dataclass(frozen=True, kw_only=True)
class StateRoots:
    """Two Merkle roots, 64 hex digits each: of a whole state, and of its weights alone."""

    state: str
    weights: str


def state_roots(weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], position: TrainPosition) -> StateRoots:
    """The roots of the state that `save_train_state` would write now: torch's random state is part of it.

    Args:
        weights: the float32 masters by name.
        optimizer: the other tensors by name.
        position: where the run stands; its `sha256` does not count.
    """
    import torch

    tensors = {**optimizer, "random_state": torch.get_rng_state()}
    of_weights = {f"weights/{name}": tensor_leaf_hash(f"weights/{name}", tensor) for name, tensor in weights.items()}
    leaves = dict(of_weights)
    leaves |= {f"optimizer/{name}": tensor_leaf_hash(f"optimizer/{name}", tensor) for name, tensor in tensors.items()}
    texts = {
        "stage": position.stage,
        "step": str(position.step),
        "stage_step": str(position.stage_step),
        "best_loss": hex_float(position.best_loss),
        "mean_loss": hex_float(position.mean_loss),
        **{f"cursor/{key}": str(value) for key, value in position.cursor.items()},
    }
    leaves |= {
        f"position/{name}": _leaf_hash(f"position/{name}", "text", "", text.encode()) for name, text in texts.items()
    }
    return StateRoots(state=merkle_root(leaves), weights=merkle_root(of_weights))


def weights_root(weights: Mapping[str, Tensor]) -> str:
    """The root of weights by the names they have in a state, 64 hex digits."""
    return merkle_root({f"weights/{name}": tensor_leaf_hash(f"weights/{name}", t) for name, t in weights.items()})


def tensor_leaf_hash(name: str, tensor: Tensor) -> bytes:
    """The 32 bytes of a tensor's leaf."""
    import torch

    kinds = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    size = tensor.element_size()
    plain = tensor.detach().cpu().contiguous().view(integers[size]).numpy()
    data = plain.astype(plain.dtype.newbyteorder("<"), copy=False)
    return _leaf_hash(name, kinds[tensor.dtype], ",".join(str(length) for length in tensor.shape), data.data)


def merkle_root(leaf_hashes: Mapping[str, bytes]) -> str:
    """The root over leaf hashes by name, 64 hex digits."""
    if not leaf_hashes:
        return hashlib.sha256().hexdigest()
    return _tree([leaf_hashes[name] for name in sorted(leaf_hashes, key=str.encode)]).hex()


def _leaf_hash(name: str, kind: str, shape: str, data: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(b"\x00" + b"\x00".join((name.encode(), kind.encode(), shape.encode(), b"")))
    digest.update(data)
    return digest.digest()


def _tree(hashes: list[bytes]) -> bytes:
    if len(hashes) == 1:
        return hashes[0]
    split = 1 << (len(hashes) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + _tree(hashes[:split]) + _tree(hashes[split:])).digest()
