"""Exact products: the same bits on every path, the specified order, small errors, right gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from exact_paths import SPECIAL, normal, paths
from openbook.core.errors import UserError
from openbook.ops import _native as native
from openbook.ops.exact_linear import exact_embedding, exact_linear, exact_matmul

# M, N, K: nothing divides anything; the last two have several pieces of k and of rows.
SHAPES = [(1, 1, 1), (1, 33, 5), (3, 32, 7), (15, 47, 17), (29, 70, 513), (5, 3, 0), (131, 65, 1100), (300, 129, 40)]


def with_specials(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(0, max(1, x.numel()), (x.numel() // 40,), generator=generator)
    values = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (len(places),), generator=generator)]
    x.view(-1)[places] = values
    return x


def bits(x: Tensor | np.ndarray) -> bytes:
    """The bytes, with every NaN as one."""
    array = np.array(x.detach().numpy() if isinstance(x, Tensor) else x)
    array[np.isnan(array)] = np.nan
    return array.tobytes()


@pytest.mark.parametrize("has_specials", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_do_not_depend_on_path_or_strides(shape: tuple[int, int, int], has_specials: bool) -> None:
    M, N, K = shape
    a, b = normal(M, K), normal(K, N, seed=1)
    if has_specials:
        a, b = with_specials(a, 2), with_specials(b, 3)
    lying = [(a, b), (a.T.contiguous().T, b), (a, b.T.contiguous().T), (torch.stack([a, a], -1)[..., 1], b)]
    found: set[bytes] = set()
    for _ in paths():
        found.update(bits(exact_matmul(x, y)) for x, y in lying)
        batch = exact_matmul(a.expand(13, M, K), b.expand(13, K, N))
        found.update((bits(batch[0]), bits(batch[12])))
    assert len(found) == 1


def test_order_is_that_of_the_specification() -> None:
    """fma over k ascending: exact products here, so that each step is one float32 rounding of a float64 sum."""
    a = torch.randint(-4095, 4096, (7, 300), generator=torch.Generator().manual_seed(0)).float()
    b = torch.randint(-2047, 2048, (300, 21), generator=torch.Generator().manual_seed(1)).float() * 2.0**-9
    acc = np.zeros((7, 21), np.float32)
    for k in range(300):
        product = a[:, k : k + 1].double().numpy() * b[k : k + 1].double().numpy()
        acc = (acc.astype(np.float64) + product).astype(np.float32)
    assert bits(exact_matmul(a, b)) == acc.tobytes()
    bias = normal(21)
    assert bits(exact_linear(a, b.T, bias)) == bits(torch.from_numpy(acc) + bias)


def test_error_against_float64_is_within_the_bound() -> None:
    a, b = normal(60, 700), normal(700, 50, seed=1)
    exact = a.double() @ b.double()
    # Each of the K steps rounds once: |error| <= K * 2^-24 * sum |a b|.
    bound = 700 * 2.0**-24 * (a.double().abs() @ b.double().abs())
    assert ((exact_matmul(a, b).double() - exact).abs() <= bound).all()


def test_accumulating_goes_on_from_the_output() -> None:
    a, b = normal(17, 600), normal(600, 35, seed=1)
    whole = exact_matmul(a, b)
    for _ in paths():
        out = exact_matmul(a[:, :123], b[:123])
        native.gemm(a[:, 123:].numpy()[None], b[123:].numpy()[None], out.numpy()[None], None, True)
        assert bits(out) == bits(whole)


def test_out_may_be_a_view() -> None:
    a, b = normal(9, 20), normal(20, 33, seed=1)
    expected = exact_matmul(a, b)
    wide, tall = torch.zeros(9, 50), torch.zeros(33, 9)
    assert exact_matmul(a, b, out=wide[:, 3:36]).data_ptr() == wide[:, 3:].data_ptr()
    exact_matmul(a, b, out=tall.T)
    assert torch.equal(wide[:, 3:36], expected) and torch.equal(tall.T, expected)
    assert not wide[:, :3].any() and not wide[:, 36:].any()


@pytest.mark.parametrize("element", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 150])
def test_packed_weights_give_the_same_bits(element: str, num_rows: int) -> None:
    x, bias = with_specials(normal(num_rows, 530), 4), normal(75, seed=2)
    weight = normal(75, 530, seed=1).to(getattr(torch, element))
    weight.view(-1)[5:11] = torch.tensor([0.0, -0.0, 6e-8, 1e-40, float("inf"), float("nan")])
    expected = bits(exact_linear(x, weight.float(), bias))
    data = weight.view(torch.uint8).view(-1).numpy()
    packings = set()
    for _ in paths():
        packed = native.PackedWeight(data, 75, 530, element)
        packings.add(packed.data.tobytes())
        out = np.empty((num_rows, 75), np.float32)
        native.packed_linear(x.numpy(), packed, bias.numpy(), out)
        assert bits(out) == expected
    assert len(packings) == 1
    again = native.PackedWeight(packed.data, 75, 530, element, is_packed=True)
    assert (again.n, again.k, again.element) == (75, 530, element)
    native.packed_linear(x.numpy(), again, None, out)
    assert bits(out) == bits(exact_linear(x, weight.float()))


def test_a_packed_weight_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^the weight has 24 bytes, expected 12 for 3 x 2 of float16; correct the shape$"
    ):
        native.PackedWeight(np.zeros(24, np.uint8), 3, 2, "float16")
    with pytest.raises(
        ValueError, match=r'^the element type is "int8", expected float32, bfloat16 or float16; convert it$'
    ):
        native.PackedWeight(np.zeros(24, np.uint8), 3, 2, "int8")


@pytest.mark.parametrize("has_bias", [False, True])
def test_gradients(has_bias: bool) -> None:
    x = normal(2, 11, 19).requires_grad_()
    weight = normal(37, 19, seed=1).requires_grad_()
    bias = normal(37, seed=2).requires_grad_() if has_bias else None
    upstream = normal(2, 11, 37, seed=3)
    inputs = [x, weight, *([bias] if bias is not None else [])]
    doubles = [one.detach().double().requires_grad_() for one in inputs]
    expected = torch.autograd.grad(torch.nn.functional.linear(*doubles), doubles, upstream.double())
    found: set[bytes] = set()
    for _ in paths():
        out = exact_linear(x, weight, bias)
        grads = torch.autograd.grad(out, inputs, upstream)
        found.add(b"".join(bits(one) for one in (out, *grads)))
    assert len(found) == 1
    for grad, one in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), one, rtol=0, atol=40 * 2.0**-24 * 20)


def test_gradient_of_the_bias_adds_rows_in_order() -> None:
    upstream = normal(23, 100) * 10.0 ** torch.arange(-11, 12)[:, None]
    bias = torch.zeros(100, requires_grad=True)
    expected = torch.zeros(100)
    for row in upstream:
        expected = expected + row
    for _ in paths():
        (grad,) = torch.autograd.grad(exact_linear(torch.ones(23, 4), torch.ones(100, 4), bias), bias, upstream)
        assert bits(grad) == bits(expected)


def test_embedding() -> None:
    weight = normal(13, 50).requires_grad_()
    ids = torch.tensor([[3, 12, 3, 0], [3, 7, 7, 3]])
    upstream = normal(2, 4, 50, seed=1) * 10.0 ** torch.arange(-4, 4).view(2, 4, 1)
    expected = torch.zeros(13, 50)
    for row, token in zip(upstream.view(-1, 50), ids.view(-1).tolist(), strict=True):
        expected[token] += row
    for _ in paths():
        out = exact_embedding(ids, weight)
        assert torch.equal(out, weight[ids])
        (grad,) = torch.autograd.grad(out, weight, upstream)
        assert bits(grad) == bits(expected)


def test_wrong_inputs_get_one_line() -> None:
    x, weight = normal(3, 4), normal(5, 4)
    fix = "but the exact profile computes in torch.float32 on cpu: convert it, or use profile fast"
    with pytest.raises(UserError, match=f"^x is torch.bfloat16 on cpu, {fix}$"):
        exact_linear(x.bfloat16(), weight)
    with pytest.raises(UserError, match=f"^b is torch.float64 on cpu, {fix}$"):
        exact_matmul(x, weight.T.double())
    with pytest.raises(UserError, match=f"^weight is torch.float16 on cpu, {fix}$"):
        exact_embedding(torch.tensor([0]), weight.half())
    with pytest.raises(UserError, match=r"^cannot multiply shapes \[3, 4\] and \[5, 4\]: expected "):
        exact_matmul(x, weight)
    with pytest.raises(UserError, match=r"^x has shape \[3, 3\] and weight \[5, 4\]: expected "):
        exact_linear(x[:, :3], weight)
    with pytest.raises(UserError, match=r"^bias has shape \[4\], expected \[5\]; check the shapes$"):
        exact_linear(x, weight, x[0])
    with pytest.raises(UserError, match=r"^out has shape \[3, 4\], expected \[3, 5\]; correct it$"):
        exact_matmul(x, weight.T, out=x)
    with pytest.raises(UserError, match=r"^ids are from 0 to 5, expected 0 to 4; check the tokenizer$"):
        exact_embedding(torch.tensor([0, 5]), weight)
    with pytest.raises(UserError, match=r"^ids are torch.int32 on cpu, expected torch.int64 on cpu; convert them$"):
        exact_embedding(torch.tensor([0], dtype=torch.int32), weight)
