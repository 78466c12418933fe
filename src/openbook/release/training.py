"""The part of a build that runs on torch: one stage of training, and the weights that come out of the last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from openbook.checkpoint.folder import save_model
from openbook.checkpoint.train_state import TrainPosition, latest_train_state, load_train_state
from openbook.core.errors import UserError
from openbook.core.seeding import derive_seed
from openbook.data.loader import ShardLoader
from openbook.models.base import CausalModel, init_weights
from openbook.models.registry import build_model
from openbook.ops.base import Ops
from openbook.ops.exact_ops import ExactOps
from openbook.ops.native_module import require_native
from openbook.ops.torch_ops import TorchOps
from openbook.tokenizer.chat import Chat
from openbook.train.ledger import Entry, Ledger, StepSink
from openbook.train.loop import Layout, LossFunction, make_loss_function, train_stage
from openbook.train.optim import Optimizer
from openbook.train.parallel import ALONE, Workers
from openbook.train.recipe import Recipe, StageConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True)
class OpenStage:
    """One stage of training, ready to go on from `position`."""

    stage: StageConfig
    optimizer: Optimizer
    loss_function: LossFunction
    loader: ShardLoader
    position: TrainPosition
    device: str

    def run(
        self,
        ledger: StepSink,
        checkpoints: Path | None,
        *,
        until: int | None = None,
        keep_states: bool = False,
        workers: Workers = ALONE,
    ) -> TrainPosition:
        """Train; see `train_stage`."""
        self.position = train_stage(
            stage=self.stage,
            optimizer=self.optimizer,
            loss_function=self.loss_function,
            loader=self.loader,
            ledger=ledger,
            checkpoints=checkpoints,
            position=self.position,
            device=self.device,
            until=until,
            keep_states=keep_states,
            workers=workers,
        )
        return self.position


def open_stage(
    recipe: Recipe, index: int, layout: Layout, *, tokenizer: Path, data: Path, start_from: Path | None
) -> OpenStage:
    """Stage `index` of the recipe, at a saved state or, for the first stage, at its very beginning.

    Args:
        start_from: a state of this stage, or the last one of the stage before.

    Raises:
        UserError: a file is missing or damaged.
    """
    use_threads(recipe, layout.threads)
    torch.use_deterministic_algorithms(True)
    # Filling would be a pass over every new tensor; nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    stage = recipe.stages[index]
    torch.manual_seed(derive_seed(recipe.seed, stage.name, "random state"))
    config = recipe.model_config(Chat.load(tokenizer).tokenizer.vocab_size)
    model = build_model(config, make_ops(recipe))
    init_weights(model, derive_seed(recipe.seed, "weights"))
    # The masters start from the float32 draw, not from its rounded image.
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.to(device=layout.device, dtype=_DTYPES[recipe.precision])
    optimizer = make_optimizer(recipe, model)
    loader = ShardLoader(
        data, stage.global_batch_tokens // recipe.data.row_tokens, derive_seed(recipe.seed, stage.name, "order")
    )
    position = _first_position(stage.name, 0, loader)
    if start_from is None:
        optimizer.restore(initial, optimizer.state())
    else:
        weights, state, saved = load_train_state(start_from)
        optimizer.restore(weights, state)
        position = saved if saved.stage == stage.name else _first_position(stage.name, saved.step, loader)
    return OpenStage(
        stage=stage,
        optimizer=optimizer,
        loss_function=make_loss_function(model, layout),
        loader=loader,
        position=position,
        device=layout.device,
    )


def run_stage(
    recipe: Recipe,
    index: int,
    layout: Layout,
    *,
    tokenizer: Path,
    data: Path,
    ledger: Path,
    checkpoints: Path,
    start_from: Path | None,
    keep_states: bool = False,
    workers: Workers = ALONE,
) -> None:
    """Run stage `index` of the recipe to its end; see `open_stage`.

    Args:
        keep_states: keep every state below `checkpoints`, not the newest two only.
        workers: the processes that train together, each calling this; the first one alone writes.

    Raises:
        UserError, CheckError: as `open_stage` and `train_stage`.
    """
    opened = open_stage(recipe, index, layout, tokenizer=tokenizer, data=data, start_from=start_from)
    if workers.rank > 0:
        opened.run(_Nowhere(), None, workers=workers)
        return
    with Ledger(ledger, opened.position.step) as lines:
        opened.run(lines, checkpoints, keep_states=keep_states, workers=workers)


class _Nowhere:
    """The ledger of a worker that writes none."""

    def append(self, entry: Entry) -> None:
        pass

    def sync(self) -> None:
        pass


def use_threads(recipe: Recipe, threads: int) -> None:
    """Split the arithmetic of the recipe's profile over so many threads.

    In the exact profile they are the native core's; torch then runs on one, as both together would fight for cores.
    """
    if recipe.profile == "exact":
        require_native().set_num_threads(threads)
    torch.set_num_threads(1 if recipe.profile == "exact" else threads)


def make_ops(recipe: Recipe) -> Ops:
    """The arithmetic of the recipe's profile.

    Raises:
        UserError: the profile is exact, and the native core is missing.
    """
    return ExactOps() if recipe.profile == "exact" else TorchOps()


def make_optimizer(recipe: Recipe, model: CausalModel) -> Optimizer:
    """The recipe's optimizer over all parameters, in the arithmetic of its profile."""
    if recipe.profile == "fast":
        return Optimizer(model.named_parameters(), recipe.optimizer)
    from openbook.train.exact_optim import ExactOptimizer  # needs the native core

    return ExactOptimizer(model.named_parameters(), recipe.optimizer)


def export_model(recipe: Recipe, checkpoints: Path, tokenizer: Path, out: Path) -> None:
    """Write the float32 weights of the newest state below `checkpoints`, config, tokenizer and template into `out`."""
    state = latest_train_state(checkpoints)
    if state is None:
        raise UserError(f"{checkpoints} holds no saved state: run the build with --resume to train first")
    chat = Chat.load(tokenizer)
    model = build_model(recipe.model_config(chat.tokenizer.vocab_size), TorchOps())
    weights, _, _ = load_train_state(state)
    model.load_state_dict(weights)
    save_model(model, out)
    chat.save(out)


def _first_position(stage: str, step: int, loader: ShardLoader) -> TrainPosition:
    """The begin of a stage, after `step` steps of the stages before it."""
    return TrainPosition(stage=stage, step=step, stage_step=0, cursor=loader.state(), best_loss=0.0, mean_loss=0.0)
