"""The root of a state depends on every bit, name, type and shape of it, and is what its definition says."""

from __future__ import annotations

import hashlib
import struct

import msgspec
import pytest
import torch
from torch import Tensor

from openbook.checkpoint.state_root import merkle_root, state_roots, tensor_leaf_hash, weights_root
from openbook.checkpoint.train_state import TrainPosition

POSITION = TrainPosition(
    stage="a", step=5, stage_step=3, cursor={"epoch": 1, "row": 2}, best_loss=1.25, mean_loss=1.5, sha256={"x": "y"}
)


def _weights() -> dict[str, Tensor]:
    return {"b": torch.arange(6, dtype=torch.float32).view(2, 3), "a": torch.tensor([-0.0, 1e-45])}


def _optimizer() -> dict[str, Tensor]:
    return {"a.exp_avg": torch.ones(2), "num_updates": torch.tensor(5, dtype=torch.int64)}


def _sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def test_the_root_of_weights_by_hand() -> None:
    leaf_a = _sha(b"\0weights/a\0F32\0" + b"2\0", struct.pack("<ff", -0.0, 1e-45))
    leaf_b = _sha(b"\0weights/b\0F32\0" + b"2,3\0", struct.pack("<6f", *range(6)))
    assert weights_root(_weights()) == _sha(b"\1", leaf_a, leaf_b).hex()
    assert weights_root({"b": _weights()["b"].T.contiguous().T, "a": _weights()["a"]}) == weights_root(_weights())


def test_the_tree_splits_at_the_largest_power_of_two() -> None:
    a, b, c, d, e = leaves = [_sha(bytes([number])) for number in range(5)]
    expected = _sha(b"\1", _sha(b"\1", _sha(b"\1", a, b), _sha(b"\1", c, d)), e)
    assert merkle_root({str(number): leaf for number, leaf in enumerate(leaves)}) == expected.hex()
    assert merkle_root({"x": a}) == a.hex()
    assert merkle_root({}) == hashlib.sha256().hexdigest()


def test_the_root_of_a_state_by_hand() -> None:
    leaves = {f"weights/{name}": tensor_leaf_hash(f"weights/{name}", tensor) for name, tensor in _weights().items()}
    leaves["optimizer/a.exp_avg"] = _sha(b"\0optimizer/a.exp_avg\0F32\0" + b"2\0", struct.pack("<ff", 1, 1))
    leaves["optimizer/num_updates"] = _sha(b"\0optimizer/num_updates\0I64\0\0", struct.pack("<q", 5))
    random_state = torch.get_rng_state().numpy().tobytes()
    size = str(len(random_state)).encode()
    leaves["optimizer/random_state"] = _sha(b"\0optimizer/random_state\0U8\0" + size + b"\0", random_state)
    for name, text in {
        "stage": b"a",
        "step": b"5",
        "stage_step": b"3",
        "best_loss": b"0x1.4p+0",
        "mean_loss": b"0x1.8p+0",
        "cursor/epoch": b"1",
        "cursor/row": b"2",
    }.items():
        leaves[f"position/{name}"] = _sha(f"\0position/{name}\0text\0\0".encode(), text)
    roots = state_roots(_weights(), _optimizer(), POSITION)
    assert roots.state == merkle_root(leaves)
    assert roots.weights == weights_root(_weights())


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "b"},
        {"step": 6},
        {"stage_step": 4},
        {"cursor": {"epoch": 1, "row": 3}},
        {"cursor": {"epoch": 1}},
        {"best_loss": 1.2500000000000002},
        {"mean_loss": 1.25},
    ],
)
def test_the_position_counts(changes: dict[str, object]) -> None:
    roots = state_roots(_weights(), _optimizer(), POSITION)
    other = state_roots(_weights(), _optimizer(), msgspec.structs.replace(POSITION, **changes))
    assert other.state != roots.state
    assert other.weights == roots.weights


def test_every_tensor_counts_and_the_random_state_does() -> None:
    roots = state_roots(_weights(), _optimizer(), POSITION)
    assert state_roots(_weights(), _optimizer(), msgspec.structs.replace(POSITION, sha256={})) == roots
    seen = {roots.state}
    for changed in (
        {**_optimizer(), "num_updates": torch.tensor(6)},
        {**_optimizer(), "a.exp_avg": torch.tensor([1.0, 1.0000001])},
        {**_optimizer(), "a.exp_avg": torch.ones(2, 1)},
        {**_optimizer(), "a.exp_avg": torch.ones(2).view(torch.int32)},
        {"b.exp_avg": torch.ones(2), "num_updates": torch.tensor(5)},
    ):
        seen.add(state_roots(_weights(), changed, POSITION).state)
    flipped = _weights()
    flipped["a"][0] = 0.0
    seen.add(state_roots(flipped, _optimizer(), POSITION).state)
    with torch.random.fork_rng(devices=[]):
        torch.rand(1)
        seen.add(state_roots(_weights(), _optimizer(), POSITION).state)
    assert len(seen) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int8, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0, 1], dtype=dtype)
    kind = {"bfloat16": b"BF16", "float16": b"F16", "bool": b"BOOL", "int8": b"I8", "float64": b"F64"}
    data = tensor.view(torch.uint8).numpy().tobytes()
    assert tensor_leaf_hash("x", tensor) == _sha(b"\0x\0" + kind[str(dtype)[6:]] + b"\0" + b"2\0", data)
