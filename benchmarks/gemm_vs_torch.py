"""Exact products of float32 matrices over torch.matmul: a linear layer forward and both its gradients.

The layers of nano, of a model of 135 million and of one of 0.6 billion parameters. Both sides write into memory that is
there already; they take turns, each for some dozen milliseconds. The last line of each model is the geometric mean.

    python benchmarks/gemm_vs_torch.py [--model nano 135M 0.6B] [--rounds 15] [--write]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from performance_page import machine, write_section
from torch import Tensor

from openbook.ops import _native
from openbook.ops.exact_linear import exact_matmul

TARGET = 0.9
TITLE = "Exact products of matrices against torch"
TURN_S = 0.03
ASLEEP_S = 0.02

Product = Callable[[Tensor, Tensor, Tensor], object]


class Layer(NamedTuple):
    """A linear layer: rows of input, features in and out."""

    title: str
    rows: int
    size_in: int
    size_out: int

    def products(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """What is multiplied forward, and for the gradients of input and weight."""
        generator = torch.Generator().manual_seed(1)
        x, weight, grad = (
            torch.randn(shape, generator=generator)
            for shape in ((self.rows, self.size_in), (self.size_out, self.size_in), (self.rows, self.size_out))
        )
        yield "forward", x, weight.T
        yield "gradient of x", grad, weight
        yield "gradient of weight", grad.T, x


# Rows: the tokens of nano's step; of the others a prompt.
MODELS = {
    "nano": (
        Layer("q, o", 2304, 128, 128),
        Layer("gate and up", 2304, 128, 768),
        Layer("down", 2304, 384, 128),
        Layer("output", 2304, 128, 1024),
    ),
    "135M": (
        Layer("q, o", 1024, 576, 576),
        Layer("gate and up", 1024, 576, 3072),
        Layer("down", 1024, 1536, 576),
    ),
    "0.6B": (
        Layer("k, v", 1024, 1024, 1024),
        Layer("q", 1024, 1024, 2048),
        Layer("gate and up", 1024, 1024, 6144),
        Layer("down", 1024, 3072, 1024),
    ),
}


def torch_product(a: Tensor, b: Tensor, out: Tensor) -> object:
    """torch.matmul with the arguments of `exact_matmul`."""
    return torch.mm(a, b, out=out)


def seconds(product: Product, a: Tensor, b: Tensor, out: Tensor, repeats: int) -> float:
    """Of one product, mean of `repeats`; first the other side's threads fall asleep, which spin for a while."""
    time.sleep(ASLEEP_S)
    product(a, b, out)
    product(a, b, out)
    began_s = time.perf_counter()
    for _ in range(repeats):
        product(a, b, out)
    return (time.perf_counter() - began_s) / repeats


def compare(a: Tensor, b: Tensor, rounds: int) -> tuple[float, float, float]:
    """GFLOP/s of ours and of torch, and the ratio: medians over the rounds.

    Raises:
        SystemExit: the products differ.
    """
    mine, other = torch.empty(len(a), b.shape[1]), torch.empty(len(a), b.shape[1])
    sides: tuple[tuple[Product, Tensor], ...] = ((exact_matmul, mine), (torch_product, other))
    once_s = max(seconds(product, a, b, out, 1) for product, out in sides)
    if not torch.allclose(mine, other, rtol=1e-4, atol=1e-3):
        raise SystemExit("the two products differ")
    repeats = max(1, round(TURN_S / once_s))
    turns = [[seconds(product, a, b, out, repeats) for product, out in sides] for _ in range(rounds)]
    giga = 2e-9 * a.numel() * b.shape[1]
    speeds = [statistics.median(giga / turn[side] for turn in turns) for side in range(2)]
    return speeds[0], speeds[1], statistics.median(other_s / mine_s for mine_s, other_s in turns)


def main() -> None:
    """Measure, print a table, and with --write put it into docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    _native.set_num_threads(arguments.threads)
    lines = [
        "| model | layer | product | rows x in x out | exact, GFLOP/s | torch, GFLOP/s | ratio | target |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(lines), flush=True)
    for model in arguments.model:
        ratios = []
        for layer in MODELS[model]:
            shape = f"{layer.rows} x {layer.size_in} x {layer.size_out}"
            for title, a, b in layer.products():
                mine, other, ratio = compare(a, b, arguments.rounds)
                ratios.append(ratio)
                lines.append(
                    f"| {model} | {layer.title} | {title} | {shape} | {mine:.0f} | {other:.0f} | {ratio:.2f} | |"
                )
                print(lines[-1], flush=True)
        lines.append(f"| {model} | geometric mean | | | | | {statistics.geometric_mean(ratios):.2f} | {TARGET} |")
        print(lines[-1], flush=True)
    if arguments.write:
        setting = (
            f"Instruction set {_native.isa()}, {arguments.threads} threads, median of {arguments.rounds} alternating "
            "rounds (`python benchmarks/gemm_vs_torch.py --write`)."
        )
        write_section(TITLE, "\n".join([machine(), "", setting, "", *lines]))


if __name__ == "__main__":
    main()
