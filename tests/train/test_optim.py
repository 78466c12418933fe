"""The optimizers against torch's own, and their state through a save."""

from __future__ import annotations

import msgspec
import pytest
import torch

from openbook.core.config import convert
from openbook.core.errors import UserError
from openbook.train.optim import Optimizer, OptimizerConfig, orthogonalize


def _parameters(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "embed.weight": (12, 8),
        "up.weight": (16, 8),
        "down.weight": (8, 16),
        "up2.weight": (16, 8),
        "norm": (8,),
    }
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()
    }


def _set_grads(parameters: dict[str, torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_adamw_is_torchs_adamw() -> None:
    ours, theirs = _parameters(), _parameters()
    optimizer = Optimizer(ours.items(), OptimizerConfig(kind="adamw", weight_decay=0.1))
    groups = [
        {"params": [p for p in theirs.values() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for step in range(20):
        for parameters in (ours, theirs):
            _set_grads(parameters, step)
        optimizer.step(0.01)
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_muon_is_torchs_muon_in_float32_and_bfloat16_rounding() -> None:
    ours, theirs = _parameters(), _parameters()
    names = ["up.weight", "down.weight", "up2.weight"]
    optimizer = Optimizer(ours.items(), OptimizerConfig(kind="muon", weight_decay=0.1))
    reference = torch.optim.Muon(
        [theirs[name] for name in names], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(5):
        for parameters in (ours, theirs):
            _set_grads(parameters, step)
        optimizer.step(0.01)
        reference.step()
    for name in names:
        moved = (ours[name] - _parameters()[name]).norm()
        # torch iterates in bfloat16, we in float32.
        assert (ours[name] - theirs[name]).norm() < 0.02 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_gives_singular_values_near_one(dtype: torch.dtype) -> None:
    for shape in ((3, 8, 8), (2, 16, 6), (2, 6, 16)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        found = orthogonalize(matrices.to(dtype)).float()
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.3
        assert values.max() < 1.3
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        exact = u @ vh
        cosine = (found * exact).sum((1, 2)) / exact.square().sum((1, 2))
        assert cosine.min() > 0.7


def test_clip_scales_to_the_norm_and_returns_the_norm_before() -> None:
    parameters = _parameters()
    optimizer = Optimizer(parameters.items(), OptimizerConfig(max_grad_norm=0.5))
    _set_grads(parameters, 0)
    before = torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None])
    assert float(optimizer.clip()) == pytest.approx(float(before.norm()), rel=1e-6)
    after = torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None])
    assert float(after.norm()) == pytest.approx(0.5, rel=1e-4)
    for parameter in parameters.values():
        assert parameter.grad is not None
        parameter.grad.mul_(0.1)
    small = [p.grad.clone() for p in parameters.values() if p.grad is not None]
    optimizer.clip()
    for parameter, grad in zip(parameters.values(), small, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_optimizer_goes_on_with_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    config = convert({"kind": kind, "weight_decay": 0.01}, OptimizerConfig, "the test")
    whole = _parameters(dtype)
    optimizer = Optimizer(whole.items(), config)
    for step in range(3):
        _set_grads(whole, step)
        optimizer.step(0.02)
    weights = {name: tensor.clone() for name, tensor in optimizer.weights().items()}
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    fresh = _parameters(dtype)
    resumed = Optimizer(fresh.items(), config)
    resumed.restore(weights, state)
    for parameters, one in ((whole, optimizer), (fresh, resumed)):
        for step in range(3, 6):
            _set_grads(parameters, step)
            one.step(0.02)
    for name in whole:
        assert torch.equal(whole[name], fresh[name])
        assert torch.equal(optimizer.weights()[name], resumed.weights()[name])


def test_master_weights_keep_what_bfloat16_would_lose() -> None:
    parameters = _parameters(torch.bfloat16)
    optimizer = Optimizer(parameters.items(), OptimizerConfig(kind="adamw"))
    for step in range(200):
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(1e-5)
        assert step >= 0
    moved = optimizer.weights()["norm"] - _parameters(torch.bfloat16)["norm"].float()
    torch.testing.assert_close(moved, torch.full_like(moved, -200e-5), rtol=1e-2, atol=1e-6)
    assert torch.equal(parameters["norm"], optimizer.weights()["norm"].bfloat16())


def test_state_of_another_shape_is_refused() -> None:
    optimizer = Optimizer(_parameters().items(), OptimizerConfig())
    weights = {name: tensor.clone() for name, tensor in optimizer.weights().items()}
    weights["norm"] = torch.zeros(9)
    with pytest.raises(UserError, match=r"checkpoint's weights do not fit this recipe \(first difference: norm\)"):
        optimizer.restore(weights, optimizer.state())
    state = optimizer.state()
    del state["norm.exp_avg"]
    with pytest.raises(UserError, match=r"optimizer state do not fit this recipe \(first difference: norm.exp_avg\)"):
        optimizer.restore(optimizer.weights(), state)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta1": 1.0}, "beta1 is 1.0, expected at least 0 and below 1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0, expected a number above 0"),
        ({"kind": "sgd"}, "kind: invalid enum value 'sgd'"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, expected 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert(values, OptimizerConfig, "the test")
    assert msgspec.structs.asdict(OptimizerConfig())["kind"] == "muon"
