"""Rows times one matrix a group: the products of a mixture of experts, which touch only the matrices that have rows.

Shapes: R rows, E groups, I and O features in and out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openbook.ops.base import Matrices, PackedMatrices
from openbook.ops.blocked import BlockedMatrices, blocked_linear
from openbook.ops.wide_products import is_wide, wide_linear, wide_mm


def grouped_linear(x: Tensor, weight: Matrices | BlockedMatrices, ends: Tensor) -> Tensor:
    """x [R, I], weight of E matrices [O, I], ends int64 [E]: [R, O]; see `Ops.grouped_linear`."""
    out: Tensor
    if isinstance(weight, BlockedMatrices):
        return _in_turn(x, lambda x, group: blocked_linear(x, weight.matrices[group]), ends)
    if not isinstance(weight, Tensor):
        out = _PackedProducts.apply(x, weight, ends)  # type: ignore[no-untyped-call]
        return out
    if torch.compiler.is_compiling() or _is_training(x, weight):
        out = _products(x, weight, ends)
        return out
    return _in_turn(x, lambda x, group: _linear(x, weight[group]), ends)


def groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """The groups that have rows: index and rows."""
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            yield group, slice(start, end)
        start = end


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return wide_linear(x, weight) if is_wide(x) else F.linear(x, weight)


def _in_turn(x: Tensor, product: Callable[[Tensor, int], Tensor], ends: Tensor) -> Tensor:
    products = [product(x[rows], group) for group, rows in groups(ends)]
    if not products:
        return product(x, 0)
    return torch.cat(products) if len(products) > 1 else products[0]


class _PackedProducts(torch.autograd.Function):
    """Products with packed matrices, which have no gradient.

    They are expanded again for the gradient of x: autograd would keep every expanded matrix of every layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedMatrices, ends: Tensor) -> Tensor:
        ctx.weight, ctx.ends, ctx.num_columns = weight, ends, x.shape[1]

        def product(x: Tensor, group: int) -> Tensor:
            parts = [_linear(x, piece) for piece in weight.pieces(group, x.dtype)]
            return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

        return _in_turn(x, product, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight: PackedMatrices = ctx.weight

        def product(grad: Tensor, group: int) -> Tensor:
            dx, row = grad.new_zeros(len(grad), ctx.num_columns), 0
            for piece in weight.pieces(group, grad.dtype):
                dx.addmm_(grad[:, row : row + len(piece)], piece)
                row += len(piece)
            return dx

        return _in_turn(grads[0], product, ctx.ends), None, None


def _is_training(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


# An operator of its own: the compiler cannot see through sizes that are data, and autograd would make a gradient of all
# matrices for each product.
@torch.library.custom_op("openbook::grouped_linear", mutates_args=())
def _products(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    out = x.new_empty(len(x), weight.shape[1])
    for group, rows in groups(ends):
        wide_mm(x[rows], weight[group].t(), out=out[rows])
    return out


@_products.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("openbook::grouped_linear_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
    for group, rows in groups(ends):
        wide_mm(grad[rows], weight[group], out=dx[rows])
        wide_mm(grad[rows].t(), x[rows], out=dweight[group])
    return dx, dweight


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_backward(grad, *ctx.saved_tensors), None


_products.register_autograd(_gradient, setup_context=_save)
