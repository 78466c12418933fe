"""Products of bfloat16 matrices on CPUs that have no instructions for them.

PyTorch then multiplies number by number, up to a hundred times slower than in float32. So the matrices are expanded to
float32, multiplied and added up in it, and the result is rounded once, which is what the instructions do too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# With fewer rows a product only waits for the matrix, which is twice as long in float32.
_LEAST_ROWS = 4

# Whether this CPU multiplies bfloat16 matrices by itself.
HAS_BFLOAT16_PRODUCTS = bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_wide(x: Tensor) -> bool:
    """Whether products of `x`, [..., D], are to be expanded."""
    is_narrow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not HAS_BFLOAT16_PRODUCTS
    return is_narrow and x.numel() >= _LEAST_ROWS * x.shape[-1]


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] times weight [O, I] transposed, plus bias [O]: [..., O], all in bfloat16."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad) and not torch.compiler.is_compiling():
        out: Tensor = _WideLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def wide_bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`torch.bmm`, through float32 where that is faster."""
    if not is_wide(a):
        return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
    product = torch.bmm(a.float(), b.float())
    return product.to(a.dtype) if out is None else out.copy_(product)


def wide_mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`torch.mm` into `out`, through float32 where that is faster."""
    if is_wide(a):
        out.copy_(a.float() @ b.float())
    else:
        torch.mm(a, b, out=out)


class _WideLinear(torch.autograd.Function):
    """Keeps what it needs for the gradient in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].float()
        rows = grad.flatten(0, -2)
        dx = (grad @ weight.float()).to(x.dtype)
        dweight = (rows.T @ x.float().flatten(0, -2)).to(weight.dtype)
        return dx, dweight, rows.sum(0).to(weight.dtype) if ctx.has_bias else None
