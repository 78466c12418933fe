"""One stage of training: batches in, updates out, a ledger line a step, a whole state every so many steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from openbook.checkpoint.state_root import state_roots
from openbook.checkpoint.train_state import TrainPosition, save_train_state
from openbook.core.errors import CheckError
from openbook.core.progress import Progress
from openbook.data.loader import Batch, ShardLoader
from openbook.models.base import trained_positions
from openbook.models.context import PackedContext
from openbook.train.ledger import Entry, SavedState, StepSink
from openbook.train.optim import Optimizer
from openbook.train.parallel import ALONE, Workers
from openbook.train.recipe import StageConfig
from openbook.train.schedule import learning_rate
from openbook.train.segments import is_saved_after
from openbook.train.tree_sum import TreeSum

if TYPE_CHECKING:
    from torch import Tensor

    from openbook.models.base import CausalModel

# The divergence watch: the mean over about the last 50 steps may not leave its best value by more than this.
_MEAN_DECAY = 0.98
_DIVERGED_NATS = 1.5


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where and how fast a build runs. In the fast profile it may change bits, and a resumed build keeps it.

    device: "cpu" or "cuda". threads: of the CPU backend. is_compiled: whether the step goes through torch.compile.
    """

    device: str
    threads: int
    is_compiled: bool


LossFunction = Callable[["Tensor", "Tensor", "Tensor", "Tensor"], "Tensor"]


def make_loss_function(model: CausalModel, layout: Layout) -> LossFunction:
    """(ids, targets, positions, documents), each int64 [B, T], to the summed loss; compiled if the layout says so."""

    def loss(ids: Tensor, targets: Tensor, positions: Tensor, documents: Tensor, trained: Tensor) -> Tensor:
        return model.loss(ids, targets, PackedContext(positions, documents), trained)

    if layout.is_compiled:
        return _compiled(loss, list(model.parameters()))
    return lambda ids, targets, positions, documents: loss(
        ids, targets, positions, documents, trained_positions(targets)
    )


def _compiled(loss: Callable[..., Tensor], parameters: list[Tensor]) -> LossFunction:
    """`loss` compiled for rows of a fixed shape, of which any number of positions is trained on."""
    function = torch.compile(loss, dynamic=False, fullgraph=True)
    shapes: set[torch.Size] = set()

    def call(*batch: Tensor) -> Tensor:
        shape = batch[0].shape
        if shape not in shapes:
            # The compiler may look at the numbers of its first example. Were that a batch, a resumed build would show
            # it another one, and might get other code and other bits.
            shapes.add(shape)
            zeros = torch.zeros_like(batch[0])
            ramp = torch.arange(shape[1], device=zeros.device).expand(shape).contiguous()
            half = torch.arange(max(2, zeros.numel() // 2), device=zeros.device)
            torch.autograd.grad(run(zeros, zeros, ramp, zeros, half), parameters)
        return run(*batch, trained_positions(batch[1]))

    def run(*arguments: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(arguments[-1], 0)
        value: Tensor = function(*arguments)
        return value

    return call


def train_stage(
    *,
    stage: StageConfig,
    optimizer: Optimizer,
    loss_function: LossFunction,
    loader: ShardLoader,
    ledger: StepSink,
    checkpoints: Path | None,
    position: TrainPosition,
    device: str,
    until: int | None = None,
    keep_states: bool = False,
    workers: Workers = ALONE,
) -> TrainPosition:
    """Run `stage` from `position` to its end, or until `until` of its steps are done; the last state is always saved.

    Args:
        checkpoints: where states are saved; None saves none (a replay).
        keep_states: keep every state, not the newest two only.
        workers: the processes that take each step together; each calls this with a stage, an optimizer and a loader
            that stand at the same place.

    Raises:
        CheckError: the loss or the gradient is not a number, or the loss has left its best value for good.
        UserError: a file cannot be read or written.
    """
    loader.restore(position.cursor)
    step, stage_step = position.step, position.stage_step
    best, mean = position.best_loss, position.mean_loss
    began_s, num_tokens = time.monotonic(), 0
    end = stage.steps if until is None else until
    with Progress(f"train {stage.name}", end, start=stage_step) as progress:
        while stage_step < end:
            batch = loader.next_batch()
            lr = learning_rate(stage.schedule, stage_step, stage.steps)
            loss, grad_norm = train_step(batch, optimizer, loss_function, stage.micro_batch_size, lr, device, workers)
            mean = loss if stage_step == 0 else _MEAN_DECAY * mean + (1.0 - _MEAN_DECAY) * loss
            best = mean if stage_step == 0 else min(best, mean)
            _require_sane(step, loss, grad_norm, mean, best)
            tokens = int((batch.documents >= 0).sum())
            step, stage_step, num_tokens = step + 1, stage_step + 1, num_tokens + tokens
            state = None
            if is_saved_after(stage, stage_step):
                position = TrainPosition(
                    stage=stage.name,
                    step=step,
                    stage_step=stage_step,
                    cursor=loader.state(),
                    best_loss=best,
                    mean_loss=mean,
                )
                roots = state_roots(optimizer.weights(), optimizer.state(), position)
                state = SavedState(root=roots.state, weights=roots.weights, cursor=position.cursor)
            ledger.append(
                Entry(
                    step=step - 1,
                    stage=stage.name,
                    batch=batch.digest[:16],
                    lr=lr,
                    loss=loss,
                    grad_norm=grad_norm,
                    tokens=tokens,
                    state=state,
                )
            )
            rate = num_tokens / (time.monotonic() - began_s)
            progress.update(stage_step, f"step {stage_step}/{stage.steps}  loss {mean:.3f}  {rate:,.0f} tokens/s")
            if state is not None:
                ledger.sync()
                if checkpoints is not None:
                    save_train_state(
                        checkpoints, optimizer.weights(), optimizer.state(), position, keep_all=keep_states
                    )
    return position


def train_step(
    batch: Batch,
    optimizer: Optimizer,
    loss_function: LossFunction,
    micro_batch_size: int,
    lr: float,
    device: str,
    workers: Workers = ALONE,
) -> tuple[float, float]:
    """One update. Micro-batches are the leaves of one fixed tree of additions, shared by the workers.

    Returns:
        The mean loss in nats a trained token, and the gradient's L2 norm before clipping.
    """
    arrays = (batch.ids, batch.targets, batch.positions, batch.documents)
    num_rows = len(batch.ids)
    num_targets = max(1, int((batch.targets >= 0).sum()))
    parameters = optimizer.parameters()
    size = micro_batch_size or num_rows
    sums = TreeSum()
    for leaf in workers.leaves(num_rows // size):
        rows = slice(leaf * size, (leaf + 1) * size)
        loss = loss_function(*(torch.from_numpy(array[rows]).to(device) for array in arrays)) / num_targets
        sums.add([loss.detach(), *torch.autograd.grad(loss, parameters, materialize_grads=True)])
    like = [torch.empty((), device=device), *parameters]
    loss, *grads = workers.total(sums.total(), like, num_rows // size)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.contiguous()
    grad_norm = optimizer.clip()
    # A step with a gradient that is not finite would destroy the weights; the caller stops the run instead.
    if math.isfinite(grad_norm):
        optimizer.step(lr)
    return float(loss), grad_norm


def _require_sane(step: int, loss: float, grad_norm: float, mean: float, best: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise CheckError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}: training stopped, the last saved state is good; "
            'try a lower lr, more warmup_steps, or precision = "float32" in the recipe'
        )
    if mean > best + _DIVERGED_NATS:
        raise CheckError(
            f"step {step}: the loss diverges (mean {mean:.2f}, best was {best:.2f} nats a token): training stopped; "
            "try a lower lr, more warmup_steps or a smaller max_grad_norm in the recipe"
        )
