"""Products of bfloat16 matrices through float32: what they are, and that every path of TorchOps takes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from openbook.ops import wide_products
from openbook.ops.torch_ops import TorchOps
from openbook.ops.wide_products import is_wide, wide_bmm, wide_linear, wide_mm

OPS = TorchOps()
NARROW = torch.bfloat16


@pytest.fixture(autouse=True, params=["no such instructions", "as this CPU is"])
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no such instructions":
        monkeypatch.setattr(wide_products, "HAS_BFLOAT16_PRODUCTS", False)


def draw(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(NARROW)
    return values.requires_grad_(grad)


def test_few_rows_and_other_types_are_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_products, "HAS_BFLOAT16_PRODUCTS", False)
    assert is_wide(draw(4, 8)) and is_wide(draw(2, 2, 8))
    assert not is_wide(draw(3, 8))
    assert not is_wide(draw(64, 8).float())
    monkeypatch.setattr(wide_products, "HAS_BFLOAT16_PRODUCTS", True)
    assert not is_wide(draw(64, 8))


@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_rounds_once(has_bias: bool) -> None:
    x, weight = draw(2, 5, 48), draw(7, 48, seed=1)
    bias = draw(7, seed=2) if has_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    # Half a unit in the last place of bfloat16, and what float32 sums may differ by.
    assert torch.all((wide_linear(x, weight, bias).double() - expected).abs() <= expected.abs() * 2**-8 + 1e-4)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_gradients_of_linear(is_compiled: bool) -> None:
    x, weight, bias = draw(2, 5, 48, grad=True), draw(7, 48, seed=1, grad=True), draw(7, seed=2, grad=True)
    linear = torch.compile(wide_linear, fullgraph=True, backend="aot_eager") if is_compiled else wide_linear
    upstream = draw(2, 5, 7, seed=3)
    found = torch.autograd.grad(linear(x, weight, bias), (x, weight, bias), upstream)
    doubles = [one.detach().double().requires_grad_() for one in (x, weight, bias)]
    out = torch.nn.functional.linear(*doubles)
    for mine, exact in zip(found, torch.autograd.grad(out, doubles, upstream.double()), strict=True):
        assert mine.dtype == NARROW
        torch.testing.assert_close(mine.double(), exact, rtol=2**-7, atol=1e-2)


def test_products_into_a_place() -> None:
    a, b = draw(3, 9, 16), draw(3, 16, 5, seed=1)
    expected = (a.double() @ b.double()).to(NARROW).double()
    out = torch.empty(3, 9, 5, dtype=NARROW)
    assert wide_bmm(a, b, out=out) is out
    torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(wide_bmm(a, b), out)
    one = torch.empty(9, 5, dtype=NARROW)
    wide_mm(a[0], b[0], out=one)
    torch.testing.assert_close(one, out[0], rtol=2**-7, atol=1e-3)


PATHS: dict[str, Callable[[], Tensor]] = {
    "linear": lambda: OPS.linear(draw(8, 16), draw(5, 16, seed=1)),
    "grouped": lambda: OPS.grouped_linear(draw(12, 16), draw(2, 5, 16, seed=1), torch.tensor([5, 12])),
    "grouped, training": lambda: OPS.grouped_linear(
        draw(12, 16, grad=True), draw(2, 5, 16, seed=1, grad=True), torch.tensor([5, 12])
    ),
    "heads": lambda: OPS.head_linear(draw(2, 4, 3, 16), draw(3, 5, 16, seed=1)),
}


@pytest.mark.parametrize("name", PATHS)
def test_every_path_is_near_double_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = PATHS[name]()
    monkeypatch.setattr(wide_products, "HAS_BFLOAT16_PRODUCTS", True)
    assert found.dtype == NARROW
    torch.testing.assert_close(found, PATHS[name](), rtol=2**-7, atol=1e-2)
