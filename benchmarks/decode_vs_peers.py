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
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from decode_sides import Logits, Spec, Worker
from performance_page import machine, write_section
from quantised_files import MODELS, gguf_file

TARGET = 1.5
TARGET_MEMORY = 1.15
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
            return prompts.shape[0] * self.num_new / side.decode_s(prompts, self.num_new)
        return prompts.size / side.prefill_s(prompts)


WORKS = (Work("prefill 512", 1, 512, 0), Work("decode 1", 1, 128, 128), Work("decode 32", 32, 32, 16))


def sides(model: str, bits: int, folder: Path, threads: int) -> dict[str, Spec]:
    """Who takes part, by title. The first is ours; the others but OpenVINO in bf16 are its peers."""
    path = gguf_file(folder, model, {8: "Q8_0", 4: "Q4_0"}[bits])
    return {"Openbook": Spec("Openbook", path, threads, {}), "llama.cpp": Spec("llama.cpp", path, threads, {})}


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


def compare(model: str, bits: int, folder: Path, threads: int, rounds: int) -> list[str]:
    """The rows of the table for one file."""
    lines = []
    with ExitStack() as stack:
        workers = {
            title: stack.enter_context(Worker(spec)) for title, spec in sides(model, bits, folder, threads).items()
        }
        print(f"{model}, {bits} bits: logits differ by {require_agreement(workers):.3f} deviations at most", flush=True)
        for work in WORKS:
            for side in workers.values():
                work._replace(num_new=min(work.num_new, 4)).tokens_per_s(side)
            speeds = [{title: work.tokens_per_s(side) for title, side in workers.items()} for _ in range(rounds)]
            peers = [title for title in workers if title not in ("Openbook", "OpenVINO bf16")]
            ratio = statistics.median(round_["Openbook"] / max(round_[peer] for peer in peers) for round_ in speeds)
            cells = [
                f"{statistics.median(round_[title] for round_ in speeds):,.0f}" if title in workers else ""
                for title in ("Openbook", "llama.cpp", "OpenVINO", "OpenVINO bf16")
            ]
            lines.append(f"| {model} | {bits} | {work.title} | {' | '.join(cells)} | {ratio:.2f} | {TARGET} |")
            print(lines[-1], flush=True)
    return lines


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
    lines = [
        "| model | bits | work | Openbook | llama.cpp | OpenVINO | OpenVINO bf16 | ratio | target |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for model in arguments.model:
            for bits in arguments.bits:
                folder = arguments.folder or Path(temporary)
                lines += compare(model, bits, folder, arguments.threads, arguments.rounds)
    if arguments.write:
        setting = (
            f"Tokens/s, {arguments.threads} threads, median of {arguments.rounds} rounds in which the sides alternate."
        )
        write_section("Quantised inference against its peers", "\n".join([machine(), "", setting, "", *lines]))


if __name__ == "__main__":
    main()
