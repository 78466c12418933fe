"""Products of tensors with quantised matrices, see exact_quant.py; for inference: nothing here has a gradient.

Shapes: M rows, K features in, N features out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openbook.core.errors import UserError
from openbook.ops.exact_quant import QuantMatrix


def exact_quant_linear(x: Tensor, weight: QuantMatrix, bias: Tensor | None = None) -> Tensor:
    """x [..., K] float32, rounded to int8 in blocks, times weight [N, K] transposed, plus bias [N]: [..., N].

    Raises:
        UserError: another dtype or device, shapes that do not fit, or a gradient is wanted.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise UserError(
            f"a gradient was asked for through a matrix in {weight.kind}, which is for inference: train with the "
            "weights in float32, or compute under torch.no_grad()"
        )
    if x.device.type != "cpu" or x.shape[-1:] != weight.shape[1:]:
        raise UserError(
            f"x has shape {list(x.shape)} on {x.device} and weight {list(weight.shape)}: expected [..., K] and [N, K] "
            "on cpu; correct them"
        )
    rows = x.detach().reshape(-1, weight.shape[1]).numpy()
    out = weight.linear(rows, None if bias is None else bias.detach().numpy())
    return torch.from_numpy(out).view(*x.shape[:-1], weight.shape[0])


def exact_quant_embedding(ids: Tensor, weight: QuantMatrix) -> Tensor:
    """Rows of weight [N, K] at ids int64 [...], as the floats that GGUF defines: [..., K].

    Raises:
        UserError: ids that are not int64 on the CPU, or that the weight has no row for.
    """
    if ids.dtype != torch.int64 or ids.device.type != "cpu":
        raise UserError(f"ids are {ids.dtype} on {ids.device}, expected torch.int64 on cpu; convert them")
    return torch.from_numpy(weight.rows(ids.reshape(-1).numpy())).view(*ids.shape, weight.shape[1])
