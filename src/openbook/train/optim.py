"""AdamW and Muon, with float32 master weights and a state that is nothing but named tensors.

Muon moves the hidden matrices, AdamW everything else (embeddings, norms, biases). One learning rate serves both: Muon's
update is scaled to the root mean square of an AdamW update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from openbook.core.config import Config
from openbook.core.errors import UserError

# Coefficients of the quintic Newton-Schulz iteration, Keller Jordan, "Muon", 2024 (kellerjordan.github.io/posts/muon).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# Makes the update's root mean square that of AdamW: 0.2 * sqrt(max(rows, columns)), arXiv 2502.16982, section 2.2.
MUON_RMS = 0.2


class OptimizerConfig(Config, frozen=True, kw_only=True):
    """Settings of the optimizer.

    kind: "muon" (matrices by Muon, the rest by AdamW) or "adamw" (everything by AdamW).
    weight_decay: decoupled, per unit of learning rate; applied to matrices only, never to norms and biases.
    max_grad_norm: the gradient's L2 norm over all weights is clipped to this.
    """

    kind: Literal["muon", "adamw"] = "muon"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "momentum"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0 and below 1")
        for name in ("eps", "max_grad_norm"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number above 0")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}, expected 0 or more")


class Optimizer:
    """Updates named parameters in place.

    Args:
        parameters: (name, parameter) pairs in a fixed order. A parameter that is not float32 gets a float32 master copy
            that the update goes to; the parameter then is its rounded image.
        config: the settings.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], config: OptimizerConfig) -> None:
        self.config = config
        self.num_updates = 0
        # beta^num_updates as repeated products, kept in the state: `pow` differs between machines.
        self._beta1_power = self._beta2_power = 1.0
        self._parameters = dict(parameters)
        self._masters = {
            name: p.detach() if p.dtype == torch.float32 else p.detach().float() for name, p in self._parameters.items()
        }
        self._by_muon = {
            name
            for name, p in self._parameters.items()
            if config.kind == "muon" and p.ndim == 2 and "embed" not in name
        }
        self._by_muon -= {name for name in self._by_muon if "lm_head" in name}
        self._moments: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            kinds = ("momentum",) if name in self._by_muon else ("exp_avg", "exp_avg_sq")
            for kind in kinds:
                self._moments[f"{name}.{kind}"] = torch.zeros_like(master)
        self._decayed = {name for name, p in self._parameters.items() if p.ndim >= 2}
        # Same-shaped matrices are orthogonalised in one batched multiplication.
        self._muon_groups: dict[torch.Size, list[str]] = {}
        for name in self._parameters:
            if name in self._by_muon:
                self._muon_groups.setdefault(self._parameters[name].shape, []).append(name)
        self._adamw_names = [name for name in self._parameters if name not in self._by_muon]

    @torch.no_grad()
    def clip(self) -> float:
        """Scale the gradients in place to at most `max_grad_norm`; returns the L2 norm before."""
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        norms = [norm.float() for norm in torch._foreach_norm(grads)]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        scale = torch.clamp(self.config.max_grad_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(grads, scale.to(grads[0].dtype))
        return float(norm)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with learning rate `lr`; consumes and clears the gradients."""
        self.num_updates += 1
        self._beta1_power *= self.config.beta1
        self._beta2_power *= self.config.beta2
        self._decay(1.0 - lr * self.config.weight_decay)
        self._step_adamw(lr)
        for names in self._muon_groups.values():
            self._step_muon(names, lr)
        for name, p in self._parameters.items():
            if p.dtype != torch.float32:
                p.copy_(self._masters[name])
            p.grad = None

    def _decay(self, factor: float) -> None:
        """Decoupled weight decay, arXiv 1711.05101."""
        if factor != 1.0:
            torch._foreach_mul_([self._masters[name] for name in self._masters if name in self._decayed], factor)

    def _grads(self, names: list[str]) -> list[Tensor]:
        grads = []
        for name in names:
            grad = self._parameters[name].grad
            grads.append(torch.zeros_like(self._masters[name]) if grad is None else grad.float())
        return grads

    def _step_adamw(self, lr: float) -> None:
        """Adam, arXiv 1412.6980, algorithm 1."""
        names = self._adamw_names
        if not names:
            return
        c = self.config
        grads = self._grads(names)
        mean = [self._moments[f"{name}.exp_avg"] for name in names]
        square = [self._moments[f"{name}.exp_avg_sq"] for name in names]
        torch._foreach_lerp_(mean, grads, 1.0 - c.beta1)
        torch._foreach_mul_(square, c.beta2)
        torch._foreach_addcmul_(square, grads, grads, 1.0 - c.beta2)
        bias1, bias2 = 1.0 - self._beta1_power, 1.0 - self._beta2_power
        root = torch._foreach_sqrt(square)
        torch._foreach_div_(root, math.sqrt(bias2))
        torch._foreach_add_(root, c.eps)
        torch._foreach_addcdiv_([self._masters[name] for name in names], mean, root, -lr / bias1)

    def _step_muon(self, names: list[str], lr: float) -> None:
        grads = self._grads(names)
        momentum = [self._moments[f"{name}.momentum"] for name in names]
        # Nesterov momentum as in the reference implementation: the gradient is looked up ahead of the average.
        torch._foreach_lerp_(momentum, grads, 1.0 - self.config.momentum)
        ahead = torch._foreach_lerp(grads, momentum, self.config.momentum)
        update = orthogonalize(torch.stack(list(ahead)).to(self._parameters[names[0]].dtype))
        rows, columns = update.shape[-2:]
        scale = MUON_RMS * math.sqrt(max(rows, columns))
        for name, part in zip(names, update.unbind(), strict=True):
            self._masters[name].add_(part, alpha=-lr * scale)

    def weights(self) -> dict[str, Tensor]:
        """The float32 master weights by name (not copies)."""
        return dict(self._masters)

    def state(self) -> dict[str, Tensor]:
        """Every tensor besides the weights that the next update depends on, by name (not copies)."""
        return {
            **self._moments,
            "num_updates": torch.tensor(self.num_updates, dtype=torch.int64),
            "beta_powers": torch.tensor([self._beta1_power, self._beta2_power], dtype=torch.float64),
        }

    def parameters(self) -> list[Tensor]:
        """What the gradients are taken of, in their order."""
        return list(self._parameters.values())

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Take back what `weights` and `state` gave.

        Raises:
            UserError: names or shapes are not those of this model and optimizer.
        """
        for what, own, given in (("weights", self._masters, weights), ("optimizer state", self.state(), state)):
            wrong = sorted(set(own) ^ set(given)) or [n for n in own if own[n].shape != given[n].shape]
            if wrong:
                raise UserError(
                    f"the checkpoint's {what} do not fit this recipe (first difference: {wrong[0]}): "
                    "resume with the recipe that the build was started with"
                )
        for name, master in self._masters.items():
            master.copy_(weights[name])
            if self._parameters[name].dtype != torch.float32:
                self._parameters[name].copy_(master)
        for name, moment in self._moments.items():
            moment.copy_(state[name])
        self.num_updates = int(state["num_updates"])
        self._beta1_power, self._beta2_power = state["beta_powers"].tolist()


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximate U V^T of each matrix's singular value decomposition U S V^T, by Newton-Schulz iteration.

    Args:
        matrices: float32 or bfloat16 [batch, rows, columns]; the iteration runs in that dtype and bears its rounding.

    Returns:
        the same dtype and shape, with singular values between about 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
