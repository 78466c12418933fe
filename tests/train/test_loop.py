"""The training loop: it learns, adds gradients up, stops when it must, and writes down what it did."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from shard_folder import write_shard_folder

from openbook.checkpoint.state_root import state_roots
from openbook.checkpoint.train_state import TrainPosition, latest_train_state, load_train_state
from openbook.core.config import convert
from openbook.core.errors import CheckError
from openbook.data.loader import ShardLoader
from openbook.data.pack import Document
from openbook.models.base import CausalModel, init_weights
from openbook.models.config import DecoderConfig
from openbook.models.context import DenseContext
from openbook.models.registry import build_model
from openbook.ops.torch_ops import TorchOps
from openbook.release.training import run_stage
from openbook.tokenizer.chat import Chat, default_template
from openbook.tokenizer.tokenizer import Tokenizer
from openbook.train.ledger import Entry, Ledger, read_ledger
from openbook.train.loop import Layout, LossFunction, make_loss_function, train_stage
from openbook.train.optim import Optimizer, OptimizerConfig
from openbook.train.recipe import Recipe, StageConfig
from openbook.train.schedule import learning_rate

ROW_TOKENS, NUM_ROWS, VOCAB = 48, 16, 41
EAGER = Layout(device="cpu", threads=1, is_compiled=False)
MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of documents that count upwards in steps of 1 to 3; the last two thirds of each are trained on."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    documents = []
    for number in range(60):
        length = int(draw.integers(7, 18))
        ids = (int(draw.integers(VOCAB)) + int(draw.integers(1, 4)) * np.arange(length)) % VOCAB
        mask = (np.arange(length) >= length // 3).astype(np.uint8)
        documents.append(Document(number, ids.astype(np.uint16), mask))
    write_shard_folder(folder, "main", documents, NUM_ROWS, ROW_TOKENS)
    return folder


def _stage(**changes: Any) -> StageConfig:
    values = {
        "name": "main",
        "documents": 60,
        "steps": 6,
        "global_batch_tokens": 8 * ROW_TOKENS,
        "schedule": {"lr": 0.01, "warmup_steps": 2},
        "mixture": [{"task": "gcd"}],
        "checkpoint_steps": 100,
    }
    return convert({**values, **changes}, StageConfig, "the test")


def _model(dtype: torch.dtype = torch.float32) -> CausalModel:
    model = build_model(DecoderConfig(vocab_size=VOCAB, **MODEL), TorchOps())  # type: ignore[arg-type]
    init_weights(model, 5)
    return model.to(dtype)


class Training:
    """One stage over `data`, ready to run."""

    def __init__(self, data: Path, folder: Path, stage: StageConfig, *, dtype: torch.dtype = torch.float32) -> None:
        self.data, self.folder, self.stage = data, folder, stage
        self.model = _model(dtype)
        self.optimizer = Optimizer(self.model.named_parameters(), OptimizerConfig())

    def run(
        self, layout: Layout = EAGER, wrap: Callable[[LossFunction], LossFunction] = lambda loss: loss
    ) -> list[Entry]:
        loader = ShardLoader(self.data, self.stage.global_batch_tokens // ROW_TOKENS, 3)
        path = self.folder / "trace.jsonl"
        with Ledger(path, 0) as ledger:
            train_stage(
                stage=self.stage,
                optimizer=self.optimizer,
                loss_function=wrap(make_loss_function(self.model, layout)),
                loader=loader,
                ledger=ledger,
                checkpoints=self.folder / "states",
                position=TrainPosition(
                    stage="main", step=0, stage_step=0, cursor=loader.state(), best_loss=0.0, mean_loss=0.0
                ),
                device=layout.device,
            )
        return read_ledger(path)


def _losses(entries: list[Entry]) -> list[float]:
    return [entry.loss for entry in entries]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_a_tiny_set(data: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    stage = _stage(steps=60, schedule={"lr": 0.02, "warmup_steps": 5})
    losses = _losses(Training(data, tmp_path, stage, dtype=dtype).run())
    assert losses[0] == pytest.approx(np.log(VOCAB), abs=0.5)
    assert np.mean(losses[-5:]) < 0.4 * losses[0]


def test_micro_batches_add_up_to_the_whole_batch(data: Path, tmp_path: Path) -> None:
    whole, parts = (Training(data, tmp_path / str(size), _stage(micro_batch_size=size)) for size in (0, 2))
    one, other = whole.run(), parts.run()
    np.testing.assert_allclose(_losses(other), _losses(one), rtol=1e-5)
    np.testing.assert_allclose([e.grad_norm for e in other], [e.grad_norm for e in one], rtol=1e-4)
    for name, weight in whole.optimizer.weights().items():
        torch.testing.assert_close(parts.optimizer.weights()[name], weight, atol=1e-4, rtol=0)


def test_the_ledger_says_what_happened(data: Path, tmp_path: Path) -> None:
    training = Training(data, tmp_path, _stage(steps=5, global_batch_tokens=6 * ROW_TOKENS))
    entries = training.run()
    loader = ShardLoader(data, 6, 3)
    for step, entry in enumerate(entries):
        assert (entry.step, entry.stage) == (step, "main")
        batch = loader.next_batch()
        arrays = (batch.ids, batch.targets, batch.positions, batch.documents)
        assert entry.batch == hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]
        assert entry.tokens == np.count_nonzero(batch.documents >= 0)
        assert entry.lr == learning_rate(training.stage.schedule, step, 5)
    assert sum(entry.tokens for entry in entries) < 5 * 6 * ROW_TOKENS  # some is padding
    assert [entry.state is not None for entry in entries] == [False, False, False, False, True]
    state = entries[-1].state
    assert state is not None
    assert state.cursor == loader.state()
    assert state.cursor["epoch"] == 1
    latest = latest_train_state(tmp_path / "states")
    assert latest is not None
    roots = state_roots(*load_train_state(latest))
    assert (state.root, state.weights) == (roots.state, roots.weights)


def test_loss_and_gradient_norm_are_those_of_the_documents_one_by_one(data: Path, tmp_path: Path) -> None:
    entry = Training(data, tmp_path, _stage(steps=1)).run()[0]
    batch, model = ShardLoader(data, 8, 3).next_batch(), _model()
    total, count = torch.zeros(()), 0
    for number in np.unique(batch.documents[batch.documents >= 0]):
        row, column = np.nonzero(batch.documents == number)
        ids, targets = (torch.from_numpy(array[row, column]) for array in (batch.ids, batch.targets))
        logits = model(ids[None], DenseContext(1, len(ids)))[0]
        trained = targets >= 0
        total = total - logits.log_softmax(-1)[trained, targets[trained]].sum()
        count += int(trained.sum())
    (total / count).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert entry.loss == pytest.approx(float(total.detach()) / count, rel=1e-5)
    assert entry.grad_norm == pytest.approx(float(norm), rel=1e-4)


def test_a_loss_that_is_no_number_stops_before_it_reaches_the_weights(data: Path, tmp_path: Path) -> None:
    training = Training(data, tmp_path, _stage(steps=9, checkpoint_steps=2))
    seen: list[dict[str, torch.Tensor]] = []

    def poisoned(loss: LossFunction) -> LossFunction:
        def call(*arguments: Any) -> torch.Tensor:
            seen.append({name: weight.clone() for name, weight in training.optimizer.weights().items()})
            return loss(*arguments) * (float("nan") if len(seen) == 4 else 1.0)

        return call

    with pytest.raises(CheckError) as caught:
        training.run(wrap=poisoned)
    assert str(caught.value) == (
        "step 3: loss nan, gradient norm nan: training stopped, the last saved state is good; "
        'try a lower lr, more warmup_steps, or precision = "float32" in the recipe'
    )
    assert all(torch.equal(weight, seen[3][name]) for name, weight in training.optimizer.weights().items())
    latest = latest_train_state(tmp_path / "states")
    assert latest is not None
    weights, _, position = load_train_state(latest)
    assert position.step == 2
    assert all(torch.equal(weights[name], weight) for name, weight in seen[2].items())
    assert [entry.step for entry in read_ledger(tmp_path / "trace.jsonl")] == [0, 1, 2]


def test_a_loss_that_diverges_stops_with_step_and_advice(data: Path, tmp_path: Path) -> None:
    training = Training(data, tmp_path, _stage(steps=200, schedule={"lr": 3.0}))
    with pytest.raises(CheckError) as caught:
        training.run()
    line = str(caught.value)
    num_good = len(read_ledger(tmp_path / "trace.jsonl"))
    assert line.startswith(f"step {num_good}: the loss diverges (mean ")
    assert line.endswith(
        "nats a token): training stopped; try a lower lr, more warmup_steps or a smaller max_grad_norm in the recipe"
    )
    assert 0 < num_good < 199


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # from inside of inductor
def test_compiled_training_is_eager_training(data: Path, tmp_path: Path) -> None:
    compiled = Training(data, tmp_path / "compiled", _stage()).run(Layout(device="cpu", threads=1, is_compiled=True))
    eager = Training(data, tmp_path / "eager", _stage()).run()
    np.testing.assert_allclose(_losses(compiled), _losses(eager), rtol=1e-4)
    assert [e.batch for e in compiled] == [e.batch for e in eager]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # from inside of inductor
def test_a_compiled_loss_takes_any_number_of_trained_positions() -> None:
    model = build_model(DecoderConfig(vocab_size=VOCAB, **MODEL), TorchOps())
    init_weights(model, 1)
    compiled = make_loss_function(model, Layout(device="cpu", threads=1, is_compiled=True))
    eager = make_loss_function(model, EAGER)
    ids = torch.arange(40).view(2, 20)
    positions = torch.arange(20).expand(2, 20).contiguous()
    for num_trained in (1, 7, 0, 40, 2):
        targets = torch.where(torch.arange(40) < num_trained, ids.flatten().flip(0), -1).view(2, 20)
        grads = []
        for loss_function in (compiled, eager):
            loss = loss_function(ids, targets, positions, torch.zeros_like(ids))
            loss.backward()  # type: ignore[no-untyped-call]
            # Gradients of the compiler's first example would show here.
            grads.append([p.grad for p in model.parameters()])
            model.zero_grad()
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="in several pieces or its positions do not count from 0"):
        compiled(ids, targets, positions + 1, torch.zeros_like(ids))


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cuda_trains_the_same_recipe(data: Path, tmp_path: Path, tiny_tokenizer: Tokenizer, precision: str) -> None:
    stage = msgspec.to_builtins(_stage(steps=20, micro_batch_size=4))
    recipe = convert(
        {
            "name": "test",
            "description": "",
            "license": "Apache-2.0",
            "seed": 1,
            "precision": precision,
            "tokenizer": {},
            "model": MODEL,
            "data": {"row_tokens": ROW_TOKENS},
            "optimizer": {},
            "stages": [stage],
            "eval": {"tasks": ["gcd"]},
        },
        Recipe,
        "the test",
    )
    Chat(tiny_tokenizer, default_template()).save(tmp_path / "tokenizer")

    def losses(device: str, name: str) -> list[float]:
        run_stage(
            recipe,
            0,
            Layout(device=device, threads=1, is_compiled=False),
            tokenizer=tmp_path / "tokenizer",
            data=data,
            ledger=tmp_path / f"{name}.jsonl",
            checkpoints=tmp_path / name,
            start_from=None,
        )
        return _losses(read_ledger(tmp_path / f"{name}.jsonl"))

    on_cuda = losses("cuda", "cuda")
    tolerance = 2e-3 if precision == "float32" else 3e-2
    np.testing.assert_allclose(on_cuda, losses("cpu", "cpu"), rtol=tolerance)
    assert losses("cuda", "again") == on_cuda
