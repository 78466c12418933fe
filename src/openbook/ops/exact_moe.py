"""Products of a mixture of experts and of heads in the exact profile: many matrices, each output one chain over k.

Shapes: R rows, E groups, I and O features in and out, N matrices of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openbook.ops.base import Matrices, PackedMatrices
from openbook.ops.exact_linear import exact_matmul
from openbook.ops.grouped_linear import groups


def exact_products(a: Tensor, b: Tensor) -> Tensor:
    """a [N, R, I] times b [N, I, O], matrix by matrix: [N, R, O]; float32, with gradients."""
    out: Tensor = _Products.apply(a, b)  # type: ignore[no-untyped-call]
    return out


def exact_grouped_linear(x: Tensor, weight: Matrices, ends: Tensor) -> Tensor:
    """x [R, I], weight of E matrices [O, I], ends int64 [E]: [R, O]; see `Ops.grouped_linear`. Packed ones have no
    gradient."""
    out: Tensor
    if isinstance(weight, Tensor):
        out = _GroupedLinear.apply(x, weight, ends)  # type: ignore[no-untyped-call]
    else:
        out = _PackedGroupedLinear.apply(x, weight, ends)  # type: ignore[no-untyped-call]
    return out


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return exact_matmul(a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        da = exact_matmul(grads[0], b.mT) if needs_a else None
        return da, exact_matmul(a.mT, grads[0]) if needs_b else None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        out = torch.empty(len(x), weight.shape[1])
        for group, rows in groups(ends):
            exact_matmul(x[rows], weight[group].T, out=out[rows])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        dx, dweight = torch.empty(x.shape), torch.zeros(weight.shape) if ctx.needs_input_grad[1] else None
        for group, rows in groups(ends):
            exact_matmul(grads[0][rows], weight[group], out=dx[rows])
            if dweight is not None:
                exact_matmul(grads[0][rows].T, x[rows], out=dweight[group])
        return dx, dweight, None


class _PackedGroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedMatrices, ends: Tensor) -> Tensor:
        ctx.weight, ctx.ends, ctx.num_columns = weight, ends, x.shape[1]
        matrices = [
            torch.cat([exact_matmul(x[rows], piece.T) for piece in weight.pieces(group, x.dtype)], -1)
            for group, rows in groups(ends)
        ]
        return torch.cat(matrices) if matrices else x.new_empty(0, sum(len(p) for p in weight.pieces(0, x.dtype)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        dx = torch.empty(len(grads[0]), ctx.num_columns)
        for group, rows in groups(ctx.ends):
            # One matrix, not piece by piece: each gradient is one chain over all outputs.
            matrix = torch.cat(list(ctx.weight.pieces(group, grads[0].dtype)))
            exact_matmul(grads[0][rows], matrix, out=dx[rows])
        return dx, None, None
