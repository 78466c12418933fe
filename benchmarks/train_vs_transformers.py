"""Training speed: Openbook on packed rows against a plain Transformers loop on padded batches, in one process.

Both sides train the same Qwen 3 shape on the same documents with the same AdamW, precision and number of threads.
Padding does not count: a side's speed is its *useful* tokens (those of documents) a second. The Transformers side is
what its Trainer does with `group_by_length`: documents sorted by length within groups of 50 batches, padded to the
longest of their batch. The sides take turns, a few steps each; the ratio is the median over the rounds.

    python benchmarks/train_vs_transformers.py [--precision bf16 fp32] [--mode eager compiled] [--rounds 5] [--write]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import numpy as np
import torch
from performance_page import machine, write_section
from torch import Tensor

from openbook.data.corpus import Maker, sample_texts
from openbook.data.mixture import Mixture, MixtureEntry
from openbook.data.pack import Document, pack, to_arrays
from openbook.models.base import init_weights, trained_positions
from openbook.models.config import ModelConfig
from openbook.models.context import PackedContext, round_reach
from openbook.models.registry import build_model, config_to_hf
from openbook.ops.torch_ops import TorchOps
from openbook.train.optim import Optimizer, OptimizerConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TASKS = (
    "chain_sum",
    "gcd",
    "spell_backward",
    "letter_counting",
    "leg_counting",
    "palindrome_generation",
    "prime_factorization",
    "isomorphic_strings",
)
TARGETS = {"bf16": 1.5, "fp32": 1.3}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROW_TOKENS = 256
ROWS = 8
GROUP_BATCHES = 50
LEARNING_RATE = 1e-3

# A step trains on one batch and returns the number of useful tokens in it.
Step = Callable[[], int]


def documents(num_documents: int) -> tuple[list[Document], int, int]:
    """Documents of the tasks above, the vocabulary's size and the padding token."""
    from openbook.tokenizer.chat import Chat, default_template
    from openbook.tokenizer.train import TokenizerConfig, train_tokenizer

    entries = [MixtureEntry(task=task, efforts={"low": 1.0, "medium": 2.0}) for task in TASKS]
    tokenizer = train_tokenizer(sample_texts(entries, 100, seed=1), TokenizerConfig())
    maker = Maker(mixture=Mixture(entries, seed=1), chat=Chat(tokenizer, default_template()), row_tokens=ROW_TOKENS)
    chunk = maker.make(0, num_documents)
    ends = np.cumsum(chunk.lengths)
    made = [
        Document(number, chunk.ids[end - length : end], chunk.loss_mask[end - length : end])
        for number, (end, length) in enumerate(zip(ends, chunk.lengths, strict=True))
    ]
    return made, tokenizer.vocab_size, tokenizer.pad_id


def packed_batches(corpus: list[Document], pad_id: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, int]]:
    """ids, targets, positions, documents, each int64 [ROWS, ROW_TOKENS], and the number of useful tokens; for ever."""
    rows = list(pack(corpus, ROW_TOKENS, look_ahead=1024))
    whole = [rows[start : start + ROWS] for start in range(0, len(rows) - ROWS + 1, ROWS)]
    for part in cycle(whole):
        arrays = to_arrays(part, ROW_TOKENS, pad_id, np.int64)
        ids, numbers = torch.from_numpy(arrays.tokens), torch.from_numpy(arrays.documents).long()
        mask = torch.from_numpy(arrays.loss_mask)
        targets = torch.full_like(ids, -1)
        is_next = (numbers[:, 1:] == numbers[:, :-1]) & (mask[:, 1:] == 1)
        targets[:, :-1] = torch.where(is_next, ids[:, 1:], -1)
        positions = torch.zeros_like(ids)
        for row, row_documents in enumerate(part):
            start = 0
            for document in row_documents:
                positions[row, start : start + len(document.ids)] = torch.arange(len(document.ids))
                start += len(document.ids)
        yield ids, targets, positions, numbers, int((numbers >= 0).sum())


def padded_batches(corpus: list[Document], batch_size: int, pad_id: int) -> Iterator[tuple[dict[str, Tensor], int]]:
    """What Transformers' model takes, and the number of useful tokens; for ever."""
    generator = np.random.default_rng(1)
    group = GROUP_BATCHES * batch_size
    while True:
        order = generator.permutation(len(corpus))
        for start in range(0, len(order) - batch_size + 1, group):
            by_length = sorted(order[start : start + group], key=lambda i: len(corpus[i].ids), reverse=True)
            for at in range(0, len(by_length) - batch_size + 1, batch_size):
                batch = [corpus[i] for i in by_length[at : at + batch_size]]
                longest = len(batch[0].ids)
                ids = torch.full((batch_size, longest), pad_id)
                labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
                for row, document in enumerate(batch):
                    length = len(document.ids)
                    ids[row, :length] = torch.from_numpy(document.ids.astype(np.int64))
                    labels[row, :length] = torch.where(
                        torch.from_numpy(document.loss_mask) == 1, ids[row, :length], -100
                    )
                    mask[row, :length] = 1
                yield {"input_ids": ids, "labels": labels, "attention_mask": mask}, int(mask.sum())


def our_step(config: ModelConfig, dtype: torch.dtype, is_compiled: bool, corpus: list[Document], pad_id: int) -> Step:
    """Openbook: packed rows, attention in blocks, logits where a token is trained."""
    model = build_model(config, TorchOps())
    init_weights(model, torch.Generator().manual_seed(1))
    model.to(dtype)
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig(kind="adamw"))
    reach = round_reach(max(len(document.ids) for document in corpus))

    def loss_sum(ids: Tensor, targets: Tensor, positions: Tensor, numbers: Tensor, trained: Tensor) -> Tensor:
        return model.loss(ids, targets, PackedContext(positions, numbers, reach), trained)

    function = torch.compile(loss_sum, fullgraph=True) if is_compiled else loss_sum
    batches = packed_batches(corpus, pad_id)

    def step() -> int:
        ids, targets, positions, numbers, num_useful = next(batches)
        trained = trained_positions(targets)
        if is_compiled:
            torch._dynamo.mark_dynamic(trained, 0)
        (function(ids, targets, positions, numbers, trained) / len(trained)).backward()
        optimizer.clip()
        optimizer.step(LEARNING_RATE)
        return num_useful

    return step


def their_step(config: ModelConfig, dtype: torch.dtype, is_compiled: bool, corpus: list[Document], pad_id: int) -> Step:
    """Transformers: Qwen3ForCausalLM with its default attention (SDPA) on padded batches."""
    import transformers

    torch.manual_seed(1)
    model: Any = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config_to_hf(config))).to(dtype).train()
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig(kind="adamw"))
    function = torch.compile(model, dynamic=True) if is_compiled else model
    mean_length = statistics.mean(len(document.ids) for document in corpus)
    batches = padded_batches(corpus, round(ROWS * ROW_TOKENS / mean_length), pad_id)

    def step() -> int:
        batch, num_useful = next(batches)
        function(**batch, use_cache=False).loss.backward()
        optimizer.clip()
        optimizer.step(LEARNING_RATE)
        return num_useful

    return step


def speed(step: Step, num_steps: int) -> float:
    """Useful tokens a second over `num_steps` steps."""
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
    parser.add_argument("--mode", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps of each side in a round")
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    corpus, vocab_size, pad_id = documents(4000)
    lengths = [len(document.ids) for document in corpus]
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=ROW_TOKENS,
    )
    num_weights = sum(p.numel() for p in build_model(config, TorchOps(), "meta").parameters())
    setting = (
        f"{num_weights / 1e6:.1f}M parameters (hidden 256, 6 layers, vocabulary {vocab_size}), "
        f"{arguments.threads} threads, about {ROWS * ROW_TOKENS} tokens a step; {len(corpus)} documents of "
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
            make = (config, dtype, mode == "compiled", corpus, pad_id)
            ours, theirs = our_step(*make), their_step(*make)
            for step in (ours, theirs):
                speed(step, 3)
            rounds = [(speed(ours, arguments.steps), speed(theirs, arguments.steps)) for _ in range(arguments.rounds)]
            ratio = statistics.median(mine / other for mine, other in rounds)
            mine, other = (statistics.median(side) for side in zip(*rounds, strict=True))
            # Six operations a weight and token; attention and the logits left out at untrained tokens about cancel.
            share = 6 * num_weights * mine / gemm_peak(dtype)
            speeds = f"{mine:,.0f} | {other:,.0f} | {ratio:.2f}"
            lines.append(f"| {precision} | {mode} | {speeds} | {TARGETS[precision]} | {share:.0%} |")
            print(lines[-1], flush=True)
            torch.compiler.reset()
    if arguments.write:
        note = "Share of GEMM peak: 6 x parameters x Openbook's tokens/s over the best square product of the same run."
        write_section("Training against Transformers", "\n".join([machine(), "", setting, "", *lines, "", note]))


if __name__ == "__main__":
    main()
