"""The first steps of training as recipes/nano.toml has it, but on made-up rows and a third of the tokens a step.

Run alone, it writes the golden values:

    python tests/train/nano_steps.py        # tests/golden/nano_training.json

A change of these values means that no earlier exact build can be built again: say so in the commit.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from shard_folder import write_shard_folder

from openbook.checkpoint.state_root import state_roots
from openbook.checkpoint.train_state import TrainPosition
from openbook.data.loader import ShardLoader
from openbook.data.pack import Document
from openbook.models.base import init_weights
from openbook.models.registry import build_model
from openbook.release.training import make_ops, make_optimizer, use_threads
from openbook.train.loop import Layout, make_loss_function, train_step
from openbook.train.recipe import load_recipe
from openbook.train.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "nano_training.json"
MILESTONES = (4, 20, 200)  # steps after which there is a golden value
VOCAB_SIZE = 770  # of nano's tokenizer
NUM_ROWS = 240
ROWS_A_STEP = 2


def write_rows(folder: Path, row_tokens: int) -> None:
    """Rows of documents that count upwards, from raw words of a generator that never changes."""
    words = iter((np.random.Philox(key=11).random_raw(20 * NUM_ROWS) >> np.uint64(8)).tolist())
    documents = []
    for number in range(6 * NUM_ROWS):
        length, first, step = 60 + next(words) % 90, next(words) % VOCAB_SIZE, 1 + next(words) % 3
        ids = ((first + step * np.arange(length)) % VOCAB_SIZE).astype(np.uint16)
        documents.append(Document(number, ids, (np.arange(length) >= length // 4).astype(np.uint8)))
    write_shard_folder(folder, "full", documents, NUM_ROWS, row_tokens)


def train_nano(folder: Path, threads: int, *milestones: int) -> dict[str, str]:
    """Train nano up to the last milestone on the rows in `folder`; the root of the state at each of them."""
    recipe = load_recipe(ROOT / "recipes" / "nano.toml")
    stage = recipe.stages[0]
    use_threads(recipe, threads)
    model = build_model(recipe.model_config(VOCAB_SIZE), make_ops(recipe))
    init_weights(model, 1)
    optimizer = make_optimizer(recipe, model)
    layout = Layout(device="cpu", threads=threads, is_compiled=False)
    loss_function = make_loss_function(model, layout)
    loader = ShardLoader(folder, ROWS_A_STEP, 3)
    torch.manual_seed(0)  # torch's random state is part of a state
    roots = {}
    for step in range(max(milestones)):
        lr = learning_rate(stage.schedule, step, stage.steps)
        loss, _ = train_step(loader.next_batch(), optimizer, loss_function, 1, lr, "cpu")
        if step + 1 in milestones:
            position = TrainPosition(
                stage=stage.name,
                step=step + 1,
                stage_step=step + 1,
                cursor=loader.state(),
                best_loss=loss,
                mean_loss=loss,
            )
            roots[str(step + 1)] = state_roots(optimizer.weights(), optimizer.state(), position).state
    return roots


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        write_rows(Path(name), load_recipe(ROOT / "recipes" / "nano.toml").data.row_tokens)
        GOLDEN.write_text(json.dumps(train_nano(Path(name), 1, *MILESTONES), indent=2) + "\n")
