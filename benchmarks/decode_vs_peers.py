"""Quantised inference on the CPU: Openbook against llama.cpp and OpenVINO, the same weights, in turn in one run.

SmolLM2-135M and a Qwen 3 of 0.6 billion random weights, in 8 bits (GGUF Q8_0; OpenVINO: int8) and in 4 (Q4_0; int4).
Three kinds of work: the prompt pass over 512 tokens, 128 new tokens of one sequence behind 128, and 16 new tokens of
each of 32 sequences behind 32. The ratio is ours over the faster peer's at the same width, the median over rounds in
which the sides take turns. Before anything is timed, the sides' logits are compared.

    pip install -e '.[peers]'
    python benchmarks/decode_vs_peers.py [--model 135M 0.6B] [--bits 8 4] [--rounds 5] [--folder DIR] [--write]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from decode_sides import Logits, Spec, Worker
from machine_limits import Limits, best_of, measure
from performance_page import machine, write_section
from quantised_files import MODELS, gguf_file

from openbook.checkpoint.model_source import open_model
from openbook.models.sizes import cache_bytes

TITLE = "Quantised inference against its peers"
TYPES = {8: "Q8_0", 4: "Q4_0"}
TARGET = 1.5
TARGET_MEMORY = 1.15
CACHED_TOKENS = 128
CACHE_ITEM_BYTES = 4
NUM_IDS = 40_000  # ids below this are drawn; both vocabularies are larger
# Most that two sides' logits may differ, as root mean square over their standard deviation: activations are rounded to
# 8 bits on all sides, in different groups.
TOLERANCE = 0.2


class Work(NamedTuple):
    """One thing that is timed. num_new: new tokens of each sequence; 0 to time the prompt pass."""

    title: str
    num_sequences: int
    num_prompt: int
    num_new: int

    def tokens_per_s(self, side: Worker) -> float:
        """Speed of a side, all sequences together."""
        prompts = np.random.default_rng(1).integers(0, NUM_IDS, (self.num_sequences, self.num_prompt))
        if self.num_new:
            return self.num_sequences * self.num_new / side.decode_s(prompts, self.num_new)
        return prompts.size / side.prefill_s(prompts)

    def limit(self, path: Path, limits: Limits) -> float:
        """What the machine can do at most, in tokens/s."""
        return limits.tokens_per_s(
            path, self.num_sequences * (1 if self.num_new else self.num_prompt), self.num_sequences
        )


WORKS = (Work("prefill 512", 1, 512, 0), Work("decode 1", 1, 128, 128), Work("decode 32", 32, 32, 16))


# Settings of OpenVINO: as it chooses itself here (bfloat16 products of the expanded weights), and products of 8-bit
# integers with activations rounded in groups, the fastest that we found for one token at a time.
OPENVINO = {
    "OpenVINO": {},
    "OpenVINO f32": {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"},
}
WEIGHTS = {8: "int8", 4: "int4"}
FLOAT = "OpenVINO bf16 weights"  # for comparison: it is not of the same width
OURS = {"Openbook": "float32", "Openbook int8 cache": "int8"}
COLUMNS = (*OURS, "llama.cpp", *OPENVINO, FLOAT)


def sides(path: Path, bits: int, threads: int) -> dict[str, Spec]:
    """Who takes part, by title. Those in `OURS` are ours; the others but `FLOAT` are their peers."""
    specs = {title: Spec("Openbook", path, threads, {"cache": cache}) for title, cache in OURS.items()}
    specs["llama.cpp"] = Spec("llama.cpp", path, threads, {})
    for title, settings in OPENVINO.items():
        specs[title] = Spec("OpenVINO", path, threads, {"weights": WEIGHTS[bits], **settings})
    if bits == 8:
        specs[FLOAT] = Spec("OpenVINO", path, threads, {"weights": "float", "INFERENCE_PRECISION_HINT": "bf16"})
    return specs


def require_agreement(workers: Mapping[str, Worker]) -> float:
    """Compare all sides' logits with llama.cpp's, for prompts given at once and in part token by token.

    Returns:
        the largest difference, root mean square over standard deviation.

    Raises:
        SystemExit: two sides do not compute the same model.
    """
    prompts = np.random.default_rng(2).integers(0, NUM_IDS, (3, 24))
    worst = 0.0
    for num_at_once in (24, 20):
        logits: dict[str, Logits] = {title: side.logits(prompts, num_at_once) for title, side in workers.items()}
        theirs = logits["llama.cpp"]
        for title, ours in logits.items():
            error = float(np.sqrt(((ours - theirs) ** 2).mean()) / theirs.std())
            if not error < TOLERANCE:
                raise SystemExit(f"the logits of {title} are not llama.cpp's: they differ by {error:.3f} deviations")
            worst = max(worst, error)
    return worst


class Row(NamedTuple):
    """A line of the table but for the share of the limit: that is known at the end."""

    line: str
    speed: float
    work: Work
    path: Path

    def complete(self, limits: Limits) -> str:
        """The whole line."""
        return f"{self.line} {self.speed / self.work.limit(self.path, limits):.0%} |"


def compare(path: Path, threads: int, rounds: int, bits: int, first: str) -> Iterator[Row]:
    """The rows of the table for one file; `first` begins each."""
    with ExitStack() as stack:
        workers = {title: stack.enter_context(Worker(spec)) for title, spec in sides(path, bits, threads).items()}
        print(f"logits differ by at most {require_agreement(workers):.3f} deviations", flush=True)
        peers = [title for title in workers if title not in (*OURS, FLOAT)]
        for work in WORKS:
            for side in workers.values():
                work._replace(num_new=min(work.num_new, 4)).tokens_per_s(side)
            speeds = [{title: work.tokens_per_s(side) for title, side in workers.items()} for _ in range(rounds)]
            ratios = [
                f"{statistics.median(turn[ours] / max(turn[peer] for peer in peers) for turn in speeds):.2f}"
                for ours in OURS
            ]
            medians = {title: statistics.median(turn[title] for turn in speeds) for title in workers}
            cells = [f"{medians[title]:,.0f}" if title in medians else "" for title in COLUMNS]
            line = f"{first} | {work.title} | {' | '.join(cells)} | {' | '.join(ratios)} | {TARGET} |"
            yield Row(line, medians["Openbook"], work, path)


def memory(path: Path, threads: int, first: str) -> str:
    """The row of the table: what a process with the model holds after one step over 128 tokens."""
    config = open_model(path).config
    needed = path.stat().st_size + cache_bytes(config, CACHED_TOKENS, CACHE_ITEM_BYTES)
    prompt = np.random.default_rng(1).integers(0, NUM_IDS, (1, CACHED_TOKENS))
    held = {}
    for system in ("Openbook", "llama.cpp"):
        with Worker(Spec(system, path, threads, {})) as side:
            side.prefill_s(prompt)
            held[system] = side.resident_bytes()
    ratio = held["Openbook"] / needed
    cells = " | ".join(f"{value / 1e6:,.0f}" for value in (needed, held["Openbook"], held["llama.cpp"]))
    return f"{first} | {cells} | {ratio:.2f} | {TARGET_MEMORY} |"


def main() -> None:
    """Measure, print the tables, and with --write put them into docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=int, choices=[8, 4], default=[8, 4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keep the models there (1.3 GB), and use them if they are there")
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    arguments = parser.parse_args()
    speeds = [
        f"| model | bits | work | {' | '.join(COLUMNS)} | ratio | int8 cache | target | share of limit |",
        f"| --- | ---: | --- | {'---: | ' * len(COLUMNS)}---: | ---: | ---: | ---: |",
    ]
    sizes = [
        "| model | bits | weights and cache, MB | Openbook, MB | llama.cpp, MB | ratio | target: at most |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    limits, rows = [measure(arguments.threads)], list[Row]()
    with tempfile.TemporaryDirectory() as temporary:
        for model, bits in itertools.product(arguments.model, arguments.bits):
            path = gguf_file(arguments.folder or Path(temporary), model, TYPES[bits])
            first = f"| {model} | {bits}"
            sizes.append(memory(path, arguments.threads, first))
            print(sizes[-1], flush=True)
            for row in compare(path, arguments.threads, arguments.rounds, bits, first):
                rows.append(row)
                print(row.line, flush=True)
            limits.append(measure(arguments.threads))
        best = best_of(limits)
        speeds += [row.complete(best) for row in rows]
    print("\n".join(speeds), best, sep="\n")
    if arguments.write:
        write_section(TITLE, page(speeds, sizes, best, arguments.threads, arguments.rounds))


def page(speeds: Sequence[str], sizes: Sequence[str], limits: Limits, threads: int, rounds: int) -> str:
    """The section of docs/performance.md."""
    reading = f"{limits.read_bytes_per_s / 1e9:.0f} GB/s"
    products = f"{limits.int8_operations_per_s / 1e9:,.0f} G operations/s"
    return f"""{machine()}

Tokens/s with {threads} threads, median of {rounds} rounds in which the sides take turns, each in its own process: the
prompt pass over 512 tokens, 128 tokens of one sequence behind 128, and 16 tokens of each of 32 sequences behind 32
(`python benchmarks/decode_vs_peers.py --write`). The ratios are ours, as it is and with `--cache int8`, over the
fastest peer of the same width, which OpenVINO with bf16 weights is not. llama.cpp keeps keys and values in 16 bits.
135M is SmolLM2, 0.6B a Qwen 3 of random weights; ours and llama.cpp read the same GGUF file (Q8_0, Q4_0), OpenVINO the
same weights with one scale for each output (8 bits) or each 32 weights (4 bits). The limit: each weight is read once a
step ({reading}) and multiplied in 8-bit integers ({products}), whichever takes longer (share: of ours as it is); both
are the best of {2 + len(MODELS)} or more measurements between the models.

Where the rest goes. Products reach 81% of the limit: a block of 32 weights takes 8 instructions that multiply and add
four bytes, and two in floating point, which apply the scale of its weights and activations, on the same two of this
processor's four units. In a prompt pass of the 0.6B they take 79% of the time, so that 1.5 over OpenVINO, which
multiplies bfloat16 expanded from 4 bits once a pass, would leave them no time at all; attention with a cache of 8 bits
takes 9%, everything else the other 12%. In float32 attention runs at 84% of the floating-point peak. One sequence reads
weights at the speed of memory; what is missing are some 200 waits of two threads for each other a token, 2
microseconds each. With 32 sequences products take 85% of the time at nine tenths of their limit: their weights come
from memory for 32 rows only. A float32 cache is read at each step too, for the 0.6B half as many bytes again as the
weights.

{chr(10).join(speeds)}

Memory of a process that has loaded the model and computed one step over {CACHED_TOKENS} tokens, Python and all:

{chr(10).join(sizes)}"""


if __name__ == "__main__":
    main()
