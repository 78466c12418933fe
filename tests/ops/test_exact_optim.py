"""Exact optimizer arithmetic against float64, and the same bits on every path."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from exact_paths import assert_same_on_all_paths, bits, normal, with_specials
from openbook.ops.exact_optim import (
    exact_adamw_,
    exact_clip_,
    exact_combine_,
    exact_momentum_,
    exact_norm,
    exact_normalize_,
    exact_power,
    exact_scale_,
)

LR, BETA1, BETA2, TINY, DECAY = 3e-3, 0.9, 0.95, 1e-8, 0.1


def adamw(weight: Tensor, mean: Tensor, square: Tensor, grad: Tensor, update: int) -> list[Tensor]:
    """Copies of weight, mean and square after one update."""
    weight, mean, square = weight.clone(), mean.clone(), square.clone()
    exact_adamw_(
        weight,
        mean,
        square,
        grad,
        lr=LR,
        beta1=BETA1,
        beta2=BETA2,
        eps=TINY,
        weight_decay=DECAY,
        beta1_power=exact_power(BETA1, update),
        beta2_power=exact_power(BETA2, update),
    )
    return [weight, mean, square]


def test_adamw_is_that_of_torch_in_float64() -> None:
    """Ten updates; a matrix and a number of weights that no vector divides."""
    weight = normal(13, 77)
    expected = weight.double().requires_grad_()
    reference = torch.optim.AdamW([expected], lr=LR, betas=(BETA1, BETA2), eps=TINY, weight_decay=DECAY)
    state = [weight, torch.zeros_like(weight), torch.zeros_like(weight)]
    for update in range(1, 11):
        grad = normal(13, 77, seed=update)
        expected.grad = grad.double()
        reference.step()
        state = adamw(*state, grad, update)
    torch.testing.assert_close(state[0].double(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_adamw_moments_are_rounded_as_stated() -> None:
    weight, mean, square, grad = (normal(40, seed=seed) for seed in range(4))
    square = square.abs()
    new_weight, new_mean, new_square = adamw(weight, mean, square, grad, 3)

    def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """One rounding: the product of two float32 and the sum are exact in float64, but for one case in 2^29."""
        return (a.double() * b.double() + c.double()).float()

    one_minus_beta1, one_minus_beta2 = torch.tensor(1 - BETA1), torch.tensor(1 - BETA2)
    assert torch.equal(new_mean, fma(one_minus_beta1, grad - mean, mean))
    assert torch.equal(new_square, fma(one_minus_beta2 * grad, grad, torch.tensor(BETA2) * square))
    # Through numpy: torch multiplies by the reciprocal of a number where it is asked to divide.
    root = np.sqrt(new_square.numpy()) / np.float32(math.sqrt(1 - BETA2 * BETA2 * BETA2)) + np.float32(TINY)
    ratio = torch.from_numpy(new_mean.numpy() / root)
    step = torch.tensor(LR / (1 - BETA1 * BETA1 * BETA1))
    assert torch.equal(new_weight, fma(-step, ratio, weight * torch.tensor(1 - LR * DECAY)))


def test_power_is_a_repeated_product() -> None:
    assert exact_power(0.9, 0) == 1.0
    assert exact_power(0.9, 3) == 0.9 * 0.9 * 0.9
    assert exact_power(0.999, 2000) == pytest.approx(0.999**2000, rel=1e-12)


def test_norm_and_clip() -> None:
    grads = [normal(5, 7), normal(1001, seed=1), normal(3, 4, 5, seed=2)]
    expected = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    assert exact_norm(grads) == pytest.approx(expected, rel=1e-6)
    before = [grad.clone() for grad in grads]
    assert exact_clip_(grads, 1e4) == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(*pair) for pair in zip(grads, before, strict=True))
    assert exact_clip_(grads, 2.0) == pytest.approx(expected, rel=1e-6)
    for grad, old in zip(grads, before, strict=True):
        torch.testing.assert_close(grad.double(), old.double() * 2.0 / expected, rtol=1e-6, atol=0)
    assert exact_norm([]) == 0.0
    grads[1][0] = math.nan
    assert math.isnan(exact_clip_(grads, 2.0)) and grads[0].isnan().all()


def test_norm_adds_in_the_order_stated() -> None:
    """Numbers of which another order would give another sum."""
    x = (torch.arange(100, dtype=torch.float64) * 0.7).exp2().float() ** 0.5
    lanes = torch.zeros(16, dtype=torch.float64)
    for i, value in enumerate(x.double().tolist()):
        lanes[i % 16] = (lanes[i % 16] + value * value).float().double()
    sums = lanes.float()
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    one = torch.tensor([1024.0])
    total = (torch.zeros(1) + sums) + one * one
    assert exact_norm([x, one]) == float(total.sqrt())


def test_momentum_looks_ahead() -> None:
    momentum, grad = normal(9, 11), normal(9, 11, seed=1)
    moved = momentum.double().lerp(grad.double(), 0.05)
    ahead = exact_momentum_(momentum, grad, 0.95)
    torch.testing.assert_close(momentum.double(), moved, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ahead.double(), grad.double().lerp(moved, 0.95), rtol=1e-6, atol=1e-6)


def test_normalize_combine_and_scale() -> None:
    x, y = normal(9, 11), normal(9, 11, seed=1)
    combined = exact_combine_(x.clone(), y, 3.4, -4.7)
    torch.testing.assert_close(combined.double(), 3.4 * x.double() - 4.7 * y.double(), rtol=1e-5, atol=1e-5)
    assert float(exact_normalize_(x).double().norm()) == pytest.approx(1.0, rel=1e-6)
    assert exact_normalize_(torch.zeros(3, 3)).count_nonzero() == 0
    scaled = y.clone()
    exact_scale_([scaled], 0.1)
    assert torch.equal(scaled, y * torch.tensor(0.1))


def test_what_is_not_contiguous_is_refused_not_missed() -> None:
    x = normal(6, 6)
    with pytest.raises(RuntimeError, match="view"):
        exact_scale_([x.T], 2.0)
    assert torch.equal(x, normal(6, 6))


@pytest.mark.parametrize("has_specials", [False, True])
@pytest.mark.parametrize("size", [1, 16, 100_003])
def test_same_bits_on_all_paths(size: int, has_specials: bool) -> None:
    tensors = [normal(size, seed=seed) for seed in range(4)]
    if has_specials:
        tensors = [with_specials(x, seed) for seed, x in enumerate(tensors)]
    weight, mean, square, grad = tensors

    def compute() -> list[Tensor]:
        momentum, clipped = mean.clone(), [grad.clone(), weight.clone()]
        ahead = exact_momentum_(momentum, grad, 0.95)
        norm = torch.tensor(exact_clip_(clipped, 0.5))
        updated = adamw(weight, mean, square, grad, 7)
        return [*updated, momentum, ahead, *clipped, norm, exact_combine_(weight.clone(), grad, 0.3, -2.0)]

    assert_same_on_all_paths(compute)


def test_a_tensor_may_be_split_anywhere() -> None:
    """Updates are of each number: one tensor in two parts gives the same bits."""
    state = [normal(1000, seed=seed) for seed in range(4)]
    state[2] = state[2].abs()
    whole = adamw(*state, 5)
    parts = [adamw(*(x[cut].clone() for x in state), 5) for cut in (slice(0, 333), slice(333, 1000))]
    assert [bits(x) for x in whole] == [bits(torch.cat(pair)) for pair in zip(*parts, strict=True)]
