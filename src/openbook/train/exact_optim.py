"""The optimizer of the exact profile: the same updates as `Optimizer`, of which every bit is fixed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openbook.ops.exact_linear import exact_matmul
from openbook.ops.exact_optim import (
    exact_adamw_,
    exact_clip_,
    exact_combine_,
    exact_momentum_,
    exact_normalize_,
    exact_scale_,
)
from openbook.train.optim import MUON_RMS, NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, Optimizer


class ExactOptimizer(Optimizer):
    """See `Optimizer`; parameters are float32 on the CPU. State and restore are the same."""

    @torch.no_grad()
    def clip(self) -> float:
        """See `Optimizer.clip`."""
        return exact_clip_([p.grad for p in self._parameters.values() if p.grad is not None], self.config.max_grad_norm)

    def _decay(self, factor: float) -> None:
        # AdamW's update decays its own.
        if factor != 1.0:
            exact_scale_([self._masters[name] for name in self._by_muon], factor)

    def _step_adamw(self, lr: float) -> None:
        c, names = self.config, self._adamw_names
        for name, grad in zip(names, self._grads(names), strict=True):
            exact_adamw_(
                self._masters[name],
                self._moments[f"{name}.exp_avg"],
                self._moments[f"{name}.exp_avg_sq"],
                grad,
                lr=lr,
                beta1=c.beta1,
                beta2=c.beta2,
                eps=c.eps,
                weight_decay=c.weight_decay if name in self._decayed else 0.0,
                beta1_power=self._beta1_power,
                beta2_power=self._beta2_power,
            )

    def _step_muon(self, names: list[str], lr: float) -> None:
        ahead = [
            exact_momentum_(self._moments[f"{name}.momentum"], grad, self.config.momentum)
            for name, grad in zip(names, self._grads(names), strict=True)
        ]
        update = exact_orthogonalize(ahead)
        step = -lr * (MUON_RMS * math.sqrt(max(update.shape[-2:])))
        for name, part in zip(names, update.unbind(), strict=True):
            exact_combine_(self._masters[name], part, 1.0, step)


def exact_orthogonalize(matrices: list[Tensor]) -> Tensor:
    """`orthogonalize` of float32 matrices of one shape, [batch, rows, columns]; overwrites them."""
    a, b, c = NEWTON_SCHULZ
    x = torch.stack([exact_normalize_(matrix) for matrix in matrices])
    is_tall = x.shape[-2] > x.shape[-1]
    for _ in range(NEWTON_SCHULZ_STEPS):
        # The smaller of the two Gram matrices; a polynomial of it stands on the same side of x.
        gram = exact_matmul(x.mT, x) if is_tall else exact_matmul(x, x.mT)
        factor = exact_combine_(exact_matmul(gram, gram), gram, c, b)
        x = exact_combine_(x, exact_matmul(x, factor) if is_tall else exact_matmul(factor, x), a, 1.0)
    return x
