"""Training speed: Openbook on packed rows against a plain Transformers loop on padded batches, in one process.

Both sides train the same Qwen 3 shape on the same documents (the last stage of recipes/nano.toml) with the same AdamW,
precision and number of threads. Our side is the step that a build takes. Padding does not count: a side's speed is its
*useful* tokens (those of documents) a second. The Transformers side is what its Trainer does with `group_by_length`:
documents sorted by length within groups of 50 batches, padded to the longest of their batch. The sides take turns, a
few steps each; the ratio is the median over the rounds.

In fp32 our side also computes in the exact profile, against the eager loop.

    python benchmarks/train_vs_transformers.py [--precision bf16 fp32] [--mode eager compiled exact] [--write]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from performance_page import machine, write_section
from torch import Tensor

from openbook.data.corpus import sample_texts, write_stage_data
from openbook.data.loader import ShardLoader
from openbook.data.shards import map_shard
from openbook.models.base import init_weights
from openbook.models.config import DecoderConfig
from openbook.models.registry import build_model, config_to_hf
from openbook.ops import _native
from openbook.ops.exact_ops import ExactOps
from openbook.ops.torch_ops import TorchOps
from openbook.tokenizer.chat import Chat, default_template
from openbook.tokenizer.train import train_tokenizer
from openbook.train.exact_optim import ExactOptimizer
from openbook.train.loop import Layout, make_loss_function, train_step
from openbook.train.optim import Optimizer, OptimizerConfig
from openbook.train.recipe import load_recipe

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RECIPE = Path(__file__).parent.parent / "recipes" / "nano.toml"
NUM_DOCUMENTS = 4000
TARGETS = {"bf16": 1.5, "fp32": 1.3}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GROUP_BATCHES = 50
ASLEEP_S = 0.02
LEARNING_RATE = 1e-3

MODES = ["eager", "compiled", "exact"]

# A step trains on one batch and returns the number of useful tokens in it.
Step = Callable[[], int]


class Document(NamedTuple):
    """Token ids [tokens] and where they are trained on, uint8 [tokens]."""

    ids: NDArray[np.generic]
    loss_mask: NDArray[np.uint8]


class Corpus(NamedTuple):
    """A stage's data on disk, the same documents one by one, and what the model must know of their tokenizer."""

    folder: Path
    rows_a_step: int
    documents: list[Document]
    vocab_size: int
    pad_id: int
    max_tokens: int


def make_corpus(folder: Path, num_documents: int = NUM_DOCUMENTS) -> Corpus:
    """The first documents of the last stage of nano's recipe."""
    recipe = load_recipe(RECIPE)
    stage = recipe.stages[-1]
    tokenizer = train_tokenizer(
        sample_texts([entry for one in recipe.stages for entry in one.mixture], 200, recipe.seed), recipe.tokenizer
    )
    chat = Chat(tokenizer, default_template())
    write_stage_data(folder, stage.name, stage.mixture, num_documents, 1, chat, recipe.data, 1)
    documents = []
    for path in sorted(folder.glob("*.safetensors")):
        for tokens, mask, numbers in zip(*map_shard(path)[:3], strict=True):
            for number in np.unique(numbers[numbers >= 0]):
                documents.append(Document(tokens[numbers == number], mask[numbers == number]))
    rows = stage.global_batch_tokens // recipe.data.row_tokens
    return Corpus(folder, rows, documents, tokenizer.vocab_size, tokenizer.pad_id, recipe.data.row_tokens)


def padded_batches(corpus: Corpus, batch_size: int) -> Iterator[tuple[dict[str, Tensor], int]]:
    """What Transformers' model takes, and the number of useful tokens; for ever."""
    generator = np.random.default_rng(1)
    group = GROUP_BATCHES * batch_size
    documents = corpus.documents
    while True:
        order = generator.permutation(len(documents))
        for start in range(0, len(order) - batch_size + 1, group):
            by_length = sorted(order[start : start + group], key=lambda i: len(documents[i].ids), reverse=True)
            for at in range(0, len(by_length) - batch_size + 1, batch_size):
                batch = [documents[i] for i in by_length[at : at + batch_size]]
                longest = len(batch[0].ids)
                ids = torch.full((batch_size, longest), corpus.pad_id)
                labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
                for row, document in enumerate(batch):
                    length = len(document.ids)
                    ids[row, :length] = torch.from_numpy(document.ids.astype(np.int64))
                    labels[row, :length] = torch.where(
                        torch.from_numpy(document.loss_mask) == 1, ids[row, :length], -100
                    )
                    mask[row, :length] = 1
                yield {"input_ids": ids, "labels": labels, "attention_mask": mask}, int(mask.sum())


def our_step(config: DecoderConfig, dtype: torch.dtype, mode: str, corpus: Corpus) -> Step:
    """Openbook: the step of a build, on packed rows."""
    is_exact = mode == "exact"
    model = build_model(config, ExactOps() if is_exact else TorchOps())
    init_weights(model, 1)
    model.to(dtype)
    kind = ExactOptimizer if is_exact else Optimizer
    optimizer = kind(model.named_parameters(), OptimizerConfig(kind="adamw"))
    layout = Layout(device="cpu", threads=torch.get_num_threads(), is_compiled=mode == "compiled")
    loss_function = make_loss_function(model, layout)
    loader = ShardLoader(corpus.folder, corpus.rows_a_step, seed=1)

    def step() -> int:
        batch = loader.next_batch()
        train_step(batch, optimizer, loss_function, 0, LEARNING_RATE, "cpu")
        return int((batch.documents >= 0).sum())

    return step


def their_step(config: DecoderConfig, dtype: torch.dtype, mode: str, corpus: Corpus) -> Step:
    """Transformers: Qwen3ForCausalLM with its default attention (SDPA) on padded batches."""
    import transformers

    torch.manual_seed(1)
    model: Any = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config_to_hf(config))).to(dtype).train()
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig(kind="adamw"))
    function = torch.compile(model, dynamic=True) if mode == "compiled" else model
    mean_length = statistics.mean(len(document.ids) for document in corpus.documents)
    batches = padded_batches(corpus, round(corpus.rows_a_step * corpus.max_tokens / mean_length))

    def step() -> int:
        batch, num_useful = next(batches)
        function(**batch, use_cache=False).loss.backward()
        optimizer.clip()
        optimizer.step(LEARNING_RATE)
        return num_useful

    return step


def speed(step: Step, num_steps: int, torch_threads: int) -> float:
    """Useful tokens a second over `num_steps` steps; first the other side's threads fall asleep."""
    torch.set_num_threads(torch_threads)
    time.sleep(ASLEEP_S)
    began_s = time.perf_counter()
    num_useful = sum(step() for _ in range(num_steps))
    return num_useful / (time.perf_counter() - began_s)


def gemm_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the best of several large square products."""
    best = 0.0
    for size in (512, 1024, 2048):
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        for _ in range(6):
            began_s = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * size**3 / (time.perf_counter() - began_s))
    return best


def main() -> None:
    """Measure, print a table, and with --write put it into docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps of each side in a round")
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    _native.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, make_corpus(Path(folder) / "data"))


def measure(arguments: argparse.Namespace, corpus: Corpus) -> None:
    """Run all settings, print the table, and write it if asked to."""
    lengths = [len(document.ids) for document in corpus.documents]
    config = DecoderConfig(
        vocab_size=corpus.vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=corpus.max_tokens,
    )
    num_weights = sum(p.numel() for p in build_model(config, TorchOps(), "meta").parameters())
    setting = (
        f"{num_weights / 1e6:.1f}M parameters (hidden 256, 6 layers, vocabulary {corpus.vocab_size}), "
        f"{arguments.threads} threads, about {corpus.rows_a_step * corpus.max_tokens} tokens a step; "
        f"{len(lengths)} documents of "
        f"{min(lengths)} to {max(lengths)} tokens, mean {statistics.mean(lengths):.0f}; median of {arguments.rounds} "
        f"alternating rounds of {arguments.steps} steps."
    )
    print(setting, flush=True)
    lines = [
        "| precision | mode | Openbook tokens/s | Transformers tokens/s | ratio | target | share of GEMM peak |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(lines), flush=True)
    for precision in arguments.precision:
        dtype = DTYPES[precision]
        for mode in arguments.mode:
            if mode == "exact" and precision != "fp32":
                continue
            # A build in the exact profile leaves torch one thread: the others are the native core's.
            sides = (
                (our_step(config, dtype, mode, corpus), 1 if mode == "exact" else arguments.threads),
                (their_step(config, dtype, mode, corpus), arguments.threads),
            )
            for step, threads in sides:
                speed(step, 3, threads)
            rounds = [
                [speed(step, arguments.steps, threads) for step, threads in sides] for _ in range(arguments.rounds)
            ]
            ratio = statistics.median(mine / other for mine, other in rounds)
            mine, other = (statistics.median(side) for side in zip(*rounds, strict=True))
            # Six operations a weight and token; attention and the logits left out at untrained tokens about cancel.
            share = 6 * num_weights * mine / gemm_peak(dtype)
            speeds = f"{mine:,.0f} | {other:,.0f} | {ratio:.2f}"
            lines.append(f"| {precision} | {mode} | {speeds} | {TARGETS[precision]} | {share:.0%} |")
            print(lines[-1], flush=True)
            torch.compiler.reset()
    if arguments.write:
        note = (
            "Exact: ours in the exact profile, Transformers eager. Share of GEMM peak: 6 x parameters x Openbook's "
            "tokens/s over the best square product of the same run."
        )
        write_section("Training against Transformers", "\n".join([machine(), "", setting, "", *lines, "", note]))


if __name__ == "__main__":
    main()
