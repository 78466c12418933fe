"""A training step in the exact profile over the same step in torch, float32: same model, weights, batch and optimizer.

The model of recipes/nano.toml and one of 10 million parameters, on packed rows of nano's last stage, 2304 tokens a
step. Torch computes eagerly and through torch.compile. The sides take turns, a few steps each; a ratio is the median
over the rounds of their time over ours.

    python benchmarks/train_exact_vs_torch.py [--model nano 10M] [--rounds 7] [--write]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from performance_page import machine, write_section
from train_vs_transformers import LEARNING_RATE, RECIPE, Corpus, make_corpus

from openbook.data.loader import Batch, ShardLoader
from openbook.models.base import init_weights
from openbook.models.config import DecoderConfig
from openbook.models.registry import build_model
from openbook.ops import _native
from openbook.ops.base import Ops
from openbook.ops.exact_ops import ExactOps
from openbook.ops.torch_ops import TorchOps
from openbook.train.exact_optim import ExactOptimizer
from openbook.train.loop import Layout, make_loss_function, train_step
from openbook.train.optim import Optimizer, OptimizerConfig
from openbook.train.recipe import load_recipe

TARGET = 1.0
TITLE = "Exact training against torch"
NUM_DOCUMENTS = 400
ASLEEP_S = 0.02
# Most that the first loss may differ, relative.
TOLERANCE = 1e-5

# Takes a step on a batch and returns its loss.
Step = Callable[[Batch], float]


def shapes(corpus: Corpus) -> dict[str, DecoderConfig]:
    """The models by name."""
    common: dict[str, Any] = {"vocab_size": corpus.vocab_size, "head_dim": 32, "max_position_embeddings": 512}
    nano: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    larger: dict[str, Any] = {"hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 8}
    return {
        "nano": DecoderConfig(**common, **nano, num_attention_heads=4, num_key_value_heads=2),
        "10M": DecoderConfig(**common, **larger, num_attention_heads=10, num_key_value_heads=5),
    }


def make_step(config: DecoderConfig, optim: OptimizerConfig, ops: Ops, is_compiled: bool) -> Step:
    """A model of fixed weights and what trains it."""
    model = build_model(config, ops)
    init_weights(model, 1)
    kind = ExactOptimizer if isinstance(ops, ExactOps) else Optimizer
    optimizer = kind(model.named_parameters(), optim)
    layout = Layout(device="cpu", threads=torch.get_num_threads(), is_compiled=is_compiled)
    loss_function = make_loss_function(model, layout)
    return lambda batch: train_step(batch, optimizer, loss_function, 0, LEARNING_RATE, "cpu")[0]


def seconds(step: Step, batches: list[Batch], torch_threads: int) -> float:
    """Of one step, mean over `batches`; first the other side's threads fall asleep, which spin for a while."""
    torch.set_num_threads(torch_threads)
    time.sleep(ASLEEP_S)
    began_s = time.perf_counter()
    for batch in batches:
        step(batch)
    return (time.perf_counter() - began_s) / len(batches)


def compare(config: DecoderConfig, optim: OptimizerConfig, batches: list[Batch], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step by side, one entry a round.

    Raises:
        SystemExit: the sides begin with different losses.
    """
    steps = {
        "exact": make_step(config, optim, ExactOps(), False),
        "torch": make_step(config, optim, TorchOps(), False),
        "torch.compile": make_step(config, optim, TorchOps(), True),
    }
    losses = {side: step(batches[0]) for side, step in steps.items()}
    if max(losses.values()) - min(losses.values()) > TOLERANCE * losses["torch"]:
        raise SystemExit(f"the sides begin with different losses: {losses}")
    # A build in the exact profile leaves torch one thread: the others are the native core's.
    threads = {side: 1 if side == "exact" else torch.get_num_threads() for side in steps}
    for side, step in steps.items():
        seconds(step, batches, threads[side])
    times: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(rounds):
        for side, step in steps.items():
            times[side].append(seconds(step, batches, threads[side]))
    torch.set_num_threads(threads["torch"])
    torch.compiler.reset()
    return times


def main() -> None:
    """Measure, print a table, and with --write put it into docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=["nano", "10M"], default=["nano", "10M"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of each side in a round")
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    _native.set_num_threads(arguments.threads)
    optim = load_recipe(RECIPE).optimizer
    lines = [
        "| model | parameters | exact, s | torch eager | torch.compile | eager / exact | target | compile / exact |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder) / "data", NUM_DOCUMENTS)
        loader = ShardLoader(corpus.folder, corpus.rows_a_step, seed=1)
        batches = [loader.next_batch() for _ in range(arguments.steps)]
        for name in arguments.model:
            config = shapes(corpus)[name]
            size = sum(p.numel() for p in build_model(config, TorchOps(), "meta").parameters()) / 1e6
            times = compare(config, optim, batches, arguments.rounds)
            medians = " | ".join(f"{statistics.median(values):.3f}" for values in times.values())
            ratios = [
                statistics.median(other / mine for mine, other in zip(times["exact"], times[side], strict=True))
                for side in ("torch", "torch.compile")
            ]
            lines.append(f"| {name} | {size:.1f}M | {medians} | {ratios[0]:.2f} | {TARGET} | {ratios[1]:.2f} |")
            print(lines[-1], flush=True)
    if arguments.write:
        setting = (
            f"Forward, backward, clipping and {optim.kind} update in float32 on {corpus.rows_a_step} packed rows of "
            f"{corpus.max_tokens} tokens, instruction set {_native.isa()}, {arguments.threads} threads; median of "
            f"{arguments.rounds} alternating rounds of {arguments.steps} steps "
            "(`python benchmarks/train_exact_vs_torch.py --write`)."
        )
        write_section(TITLE, "\n".join([machine(), "", setting, "", *lines]))


if __name__ == "__main__":
    main()
