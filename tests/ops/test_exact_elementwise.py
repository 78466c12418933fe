"""Exact functions of elements and rows: values and gradients against float64, the same bits on every path."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from exact_paths import assert_same_on_all_paths, bits, normal, with_specials
from openbook.core.errors import UserError
from openbook.ops import exact_elementwise
from openbook.ops.exact_elementwise import (
    exact_clamped_swiglu,
    exact_gelu,
    exact_gelu_sigmoid,
    exact_gelu_tanh,
    exact_layer_norm,
    exact_linear_cross_entropy,
    exact_rms_norm,
    exact_rope,
    exact_rope_tables,
    exact_sigmoid,
    exact_silu_mul,
    exact_softmax,
    exact_softmax_cross_entropy,
)

EPS = 1e-5
# Tokens 4, of 3 + 2 + 2 heads of H features in one tensor, of which 2 heads from the third on are a slice.
HEADS = 7


def wide_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def wide_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    return scaled if bias is None else scaled + bias


def wide_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = cos.double()[:, :, None], sin.double()[:, :, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def wide_clamped_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up[..., ::2].clamp(max=1.5), gate_up[..., 1::2].clamp(-1.5, 1.5)
    return (up + 1) * gate * (1.7 * gate).sigmoid()


def wide_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    rows = (targets >= 0).nonzero().squeeze(1)
    return -logits.log_softmax(-1)[rows, targets[rows]].sum()


def slice_of_heads(x: Tensor) -> Tensor:
    """[..., HEADS * H] to two of the heads, [..., 2, H]: not contiguous."""
    return x.unflatten(-1, (HEADS, -1))[..., 2:4, :]


def targets(rows: int, classes: int) -> Tensor:
    drawn = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(5))
    drawn[::4] = -1
    return drawn


def tables(tokens: int, size: int) -> tuple[Tensor, Tensor]:
    angles = normal(2, tokens, size, seed=9) * 3
    return angles.cos(), angles.sin()


Function = Callable[..., Tensor]
# Name: ours, in float64, and the shapes of what both take, for a number of features.
CASES: dict[str, tuple[Function, Function, Callable[[int], list[tuple[int, ...]]]]] = {
    "rms_norm": (lambda x, w: exact_rms_norm(x, w, EPS), wide_rms_norm, lambda D: [(3, 5, D), (D,)]),
    "rms_norm of a slice": (
        lambda x, w: exact_rms_norm(slice_of_heads(x), w, EPS),
        lambda x, w: wide_rms_norm(slice_of_heads(x), w),
        lambda D: [(2, 3, HEADS * D), (D,)],
    ),
    "layer_norm": (lambda x, w, b: exact_layer_norm(x, w, b, EPS), wide_layer_norm, lambda D: [(3, 5, D), (D,), (D,)]),
    "layer_norm without bias": (
        lambda x, w: exact_layer_norm(x, w, None, EPS),
        wide_layer_norm,
        lambda D: [(11, D), (D,)],
    ),
    "rope": (
        lambda x: exact_rope(slice_of_heads(x), *tables(3, x.shape[-1] // HEADS // 2)),
        lambda x: wide_rope(slice_of_heads(x), *tables(3, x.shape[-1] // HEADS // 2)),
        lambda D: [(2, 3, HEADS * 2 * D)],
    ),
    "silu_mul": (
        exact_silu_mul,
        lambda x: torch.nn.functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
        lambda D: [(3, 2 * D)],
    ),
    "clamped_swiglu": (lambda x: exact_clamped_swiglu(x, 1.7, 1.5), wide_clamped_swiglu, lambda D: [(3, 2 * D)]),
    "gelu_tanh": (exact_gelu_tanh, lambda x: torch.nn.functional.gelu(x, approximate="tanh"), lambda D: [(3, D)]),
    "gelu": (exact_gelu, torch.nn.functional.gelu, lambda D: [(3, D)]),
    "gelu_sigmoid": (exact_gelu_sigmoid, lambda x: x * (1.702 * x).sigmoid(), lambda D: [(3, D)]),
    "sigmoid": (exact_sigmoid, torch.sigmoid, lambda D: [(3, D)]),
    "softmax": (exact_softmax, lambda x: x.softmax(-1), lambda D: [(5, D)]),
    "cross entropy": (
        lambda x: exact_softmax_cross_entropy(x, targets(*x.shape)),
        lambda x: wide_cross_entropy(x, targets(*x.shape)),
        lambda D: [(9, D)],
    ),
    "linear cross entropy": (
        lambda x, w: exact_linear_cross_entropy(x, w, targets(len(x), len(w))),
        lambda x, w: wide_cross_entropy(x @ w.T, targets(len(x), len(w))),
        lambda D: [(9, 5), (D, 5)],
    ),
}


def run(function: Function, inputs: list[Tensor], upstream: Tensor | None) -> list[Tensor]:
    """The result and the gradients of all inputs; `upstream` None: of ones."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    grad = torch.ones_like(out) if upstream is None else upstream.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("size", [1, 16, 37, 130])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, size: int) -> None:
    ours, wide, shapes = CASES[name]
    inputs = [normal(*shape, seed=i) * 2 for i, shape in enumerate(shapes(size))]
    upstream = normal(*ours(*inputs).shape, seed=7)
    for actual, expected in zip(
        run(ours, inputs, upstream), run(wide, [x.double() for x in inputs], upstream), strict=True
    ):
        assert actual.dtype == torch.float32
        # 16 units of the last place of the greatest number: single ones come from sums in which it takes part.
        bound = 16 * 2.0**-24 * max(1.0, float(expected.abs().max()))
        assert float((actual.double() - expected).abs().max()) <= bound


@pytest.mark.parametrize("has_specials", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_same_bits_on_all_paths(name: str, has_specials: bool) -> None:
    ours, _, shapes = CASES[name]
    inputs = [normal(*shape, seed=i) * 4 for i, shape in enumerate(shapes(67))]
    upstream = normal(*ours(*inputs).shape, seed=7)
    if has_specials:
        inputs = [with_specials(x, i) for i, x in enumerate(inputs)]
        upstream = with_specials(upstream, 8)
    assert_same_on_all_paths(lambda: run(ours, inputs, upstream))


@pytest.mark.parametrize("name", [name for name in CASES if "entropy" not in name])
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    ours, _, shapes = CASES[name]
    inputs = [normal(*shape, seed=i) for i, shape in enumerate(shapes(37))]
    if name == "rope":  # the tables' rows go with the tokens'
        together = ours(inputs[0])[:, :, 1:2]
        assert bits(together) == bits(exact_rope(slice_of_heads(inputs[0])[:, :, 1:2], *tables(3, 37)))
        return
    assert bits(ours(*inputs)[1:2]) == bits(ours(inputs[0][1:2], *inputs[1:]))


def test_sums_of_columns_over_many_rows() -> None:
    """Weights' gradients add up more rows and columns than one task has."""
    x, weight, grad = normal(301, 200), normal(200, seed=1), normal(301, 200, seed=2)
    expected = run(wide_rms_norm, [x.double(), weight.double()], grad)[2]
    actual = run(lambda x, w: exact_rms_norm(x, w, EPS), [x, weight], grad)[2]
    torch.testing.assert_close(actual.double(), expected, atol=5e-5, rtol=0)
    # The order that the header states.
    y = (x * (1 / (normalizer(x)))).double()
    total = torch.zeros(200, dtype=torch.float64)
    for row in range(301):
        total = (total + grad[row].double() * y[row]).float().double()  # one rounding: an fma
    assert torch.equal(actual, total.float())
    assert_same_on_all_paths(lambda: run(lambda x, w: exact_layer_norm(x, w, w, EPS), [x, weight], grad))


def normalizer(x: Tensor) -> Tensor:
    """sqrt(mean(x^2) + eps) of each row, float32, in the order that norm_kernels.h states."""
    lanes = torch.zeros(len(x), 16, dtype=torch.float64)
    for i in range(x.shape[1]):
        lanes[:, i % 16] = (lanes[:, i % 16] + x[:, i].double() ** 2).float().double()
    sums = lanes.float()
    while sums.shape[1] > 1:
        sums = sums[:, : sums.shape[1] // 2] + sums[:, sums.shape[1] // 2 :]
    # Through numpy: torch multiplies by the reciprocal of a number where it is asked to divide.
    return torch.from_numpy(np.sqrt(sums.numpy() / np.float32(x.shape[1]) + np.float32(EPS)))


def test_softmax_of_extremes() -> None:
    inf = math.inf
    rows = torch.tensor([[1e30, -inf, 0.0], [-inf, -inf, 5.0], [-1e38, -1e38, -inf]])
    assert exact_softmax(rows).tolist() == [[1, 0, 0], [0, 0, 1], [0.5, 0.5, 0]]
    for row in ([inf, 0.0], [-inf, -inf], [math.nan, 0.0]):
        assert exact_softmax(torch.tensor([row])).isnan().all()


def test_small_results_of_activations_keep_their_places() -> None:
    """Where (1 + tanh) / 2 is a difference of nearly equal numbers, as far as -8 and beyond."""
    x = torch.linspace(-12, -4, 1001)
    for ours, name in ((exact_gelu_tanh, "gelu_tanh"), (exact_sigmoid, "sigmoid"), (exact_gelu_sigmoid, "")):
        wide = {"gelu_tanh": lambda x: x * (2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).sigmoid()}.get(
            name, torch.sigmoid if name else lambda x: x * (1.702 * x).sigmoid()
        )
        for actual, expected in zip(run(ours, [x], None), run(wide, [x.double()], None), strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=2.0**-126)


def test_ignored_targets_count_nothing() -> None:
    logits = normal(3, 10).requires_grad_()
    loss = exact_softmax_cross_entropy(logits, torch.tensor([-1, 4, -7]))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[[0, 2]].abs().max() == 0 and logits.grad[1].abs().max() > 0
    alone = exact_softmax_cross_entropy(logits[1:2], torch.tensor([4]))
    assert torch.equal(loss, alone)
    assert exact_softmax_cross_entropy(logits, torch.tensor([-1, -1, -1])).tolist() == 0.0
    nothing = torch.empty(0, 10)
    assert exact_softmax_cross_entropy(nothing, torch.empty(0, dtype=torch.int64)).tolist() == 0.0


def test_chunked_loss_has_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, wanted = normal(70, 24), normal(33, 24, seed=1), targets(70, 33)

    def chunked() -> list[Tensor]:
        return run(lambda x, w: exact_linear_cross_entropy(x, w, wanted), [x, weight], None)

    whole = chunked()
    for rows in (1, 16, 33, 70):
        monkeypatch.setattr(exact_elementwise, "_CHUNK_ROWS", rows)
        assert [bits(t) for t in chunked()] == [bits(t) for t in whole]
    from openbook.ops.exact_linear import exact_linear

    apart = run(lambda x, w: exact_softmax_cross_entropy(exact_linear(x, w), wanted), [x, weight], None)
    assert [bits(t) for t in apart] == [bits(t) for t in whole]
    monkeypatch.setattr(exact_elementwise, "_CHUNK_ROWS", 16)
    assert_same_on_all_paths(chunked)


def test_a_gradient_can_be_taken_once() -> None:
    logits = normal(3, 10).requires_grad_()
    loss = exact_softmax_cross_entropy(logits, torch.tensor([1, 2, 3]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="was taken already: compute the loss again"):
        loss.backward()


def test_rope_tables() -> None:
    positions, frequencies = torch.tensor([[0, 1, 4095], [7, 7, 1_000_003]]), torch.tensor([1.0, 0.37, 1e-4])
    cos, sin = exact_rope_tables(positions, frequencies)
    angles = (positions[..., None].float() * frequencies).double()
    torch.testing.assert_close(cos.double(), angles.cos(), atol=2.0**-24, rtol=0)
    torch.testing.assert_close(sin.double(), angles.sin(), atol=2.0**-24, rtol=0)
    assert cos[0, 0].tolist() == [1, 1, 1] and sin[0, 0].tolist() == [0, 0, 0]


def test_bad_input_is_one_line() -> None:
    with pytest.raises(UserError, match=r"x is torch.bfloat16 on cpu, but the exact profile computes in torch.float32"):
        exact_rms_norm(torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(4), EPS)
    with pytest.raises(UserError, match=r"a target is 10, expected less than 10: check the tokenizer"):
        exact_softmax_cross_entropy(normal(2, 10), torch.tensor([3, 10]))
    with pytest.raises(UserError, match=r"weight has shape \[5\], expected \[4\]"):
        exact_rms_norm(torch.ones(2, 4), torch.ones(5), EPS)
    with pytest.raises(UserError, match=r"gate_up has shape \[2, 3\], expected an even last axis"):
        exact_silu_mul(torch.ones(2, 3))
