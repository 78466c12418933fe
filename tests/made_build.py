"""A finished build without the training: real tokenizer and data, random weights, a made-up ledger and evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from openbook.checkpoint.folder import save_model
from openbook.checkpoint.state_root import weights_root
from openbook.core.files import write_json
from openbook.data.corpus import write_stage_data
from openbook.evals.report import Item, Report, Settings, write_report
from openbook.models.base import init_weights
from openbook.models.registry import build_model
from openbook.ops.torch_ops import TorchOps
from openbook.release.assemble import assemble_release
from openbook.tasks.registry import get_task
from openbook.tokenizer.chat import Chat, default_template
from openbook.tokenizer.tokenizer import Tokenizer
from openbook.train.ledger import Entry, Ledger, SavedState
from openbook.train.recipe import Recipe, load_recipe
from openbook.train.schedule import learning_rate
from openbook.train.segments import is_saved_after

RECIPE = """
name = "pico"
description = "A model for tests; it knows nothing."
license = "Apache-2.0"
seed = 7
precision = "float32"

[tokenizer]
vocab_size = 274

[model]
model_type = "qwen3"
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
max_position_embeddings = 384
initializer_range = 0.3

[data]
row_tokens = 384

[optimizer]
kind = "muon"

[[stages]]
name = "first"
documents = 30
steps = 4
global_batch_tokens = 768
schedule = { lr = 0.01 }
mixture = [{ task = "spell_backward" }]

[[stages]]
name = "second"
documents = 40
steps = 3
global_batch_tokens = 768
schedule = { lr = 0.02 }
mixture = [{ task = "spell_backward" }, { task = "gcd" }]

[eval]
tasks = ["spell_backward", "gcd"]
samples = 2
"""


def make_build(folder: Path, tokenizer: Tokenizer) -> Path:
    """Fill `folder` as a build stands before its release is made; the weights lie in `folder`/model."""
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(RECIPE)
    recipe = load_recipe(folder / "recipe.toml")
    chat = Chat(tokenizer, default_template())
    chat.save(folder / "tokenizer")
    for stage in recipe.stages:
        write_stage_data(
            folder / "data" / stage.name, stage.name, stage.mixture, stage.documents, recipe.seed, chat, recipe.data, 1
        )
    model = build_model(recipe.model_config(tokenizer.vocab_size), TorchOps())
    init_weights(model, 3)
    save_model(model, folder / "model")
    _write_ledger(folder / "trace.jsonl", recipe, weights_root(dict(model.named_parameters())))
    _write_evaluation(folder / "evals" / "easy-medium", recipe)
    run = {"recipe": recipe.hash, "device": "cpu", "threads": 2, "is_compiled": False, "seconds": 75.0}
    write_json(folder / "run.json", {**run, "machine": "A processor, 2 cores", "versions": {"torch": "2.13.0"}})
    return folder


def _write_ledger(path: Path, recipe: Recipe, weights: str) -> None:
    step = 0
    with Ledger(path, 0) as ledger:
        for stage in recipe.stages:
            for stage_step in range(stage.steps):
                cursor = {"epoch": 0, "row": 2 * stage_step + 2, "document": 0}
                is_saved = is_saved_after(stage, stage_step + 1)
                ledger.append(
                    Entry(
                        step=step,
                        stage=stage.name,
                        batch=f"{step:016x}",
                        lr=learning_rate(stage.schedule, stage_step, stage.steps),
                        loss=5.0 - step / 2,
                        grad_norm=1.0,
                        tokens=500 + step,
                        state=SavedState(root=f"{step:064x}", weights=weights, cursor=cursor) if is_saved else None,
                    )
                )
                step += 1


def _write_evaluation(out: Path, recipe: Recipe) -> None:
    """The first problem of each task right, the second wrong."""
    items = []
    for name in recipe.eval.tasks:
        for index in range(recipe.eval.samples):
            problem = get_task(name).generate(recipe.eval.seed + index)
            answer = get_task(name).work(problem).answer if index == 0 else "wrong"
            items.append(
                Item(
                    task=name,
                    difficulty="easy",
                    seed=problem.seed,
                    problem=problem.question,
                    thinking=f"thinking about {name} {index}",
                    answer=answer,
                    reply=answer,
                    score=get_task(name).score(problem, answer),
                    prompt_tokens=10,
                    tokens=20,
                    finish_reason="stop",
                )
            )
    settings = Settings(
        model="pico",
        tasks=recipe.eval.tasks,
        difficulty="easy",
        seed=recipe.eval.seed,
        samples=recipe.eval.samples,
        effort="medium",
        prompt_style="bare",
        temperature=0.0,
        max_tokens=None,
    )
    write_report(Report(settings=settings, items=items, seconds=1.0), out)


@pytest.fixture(scope="session")
def finished_build(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder up to its evaluation, and `release` in it; do not change it."""
    folder = make_build(tmp_path_factory.mktemp("builds") / "pico", tiny_tokenizer)
    assemble_release(folder, folder / "release", folder / "model")
    return folder


@pytest.fixture(scope="session")
def made_release(finished_build: Path) -> Path:
    """The release folder of `finished_build`; do not change it."""
    return finished_build / "release"
