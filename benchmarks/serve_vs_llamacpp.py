"""Serving speed: `openbook serve` against llama.cpp's server, on the same GGUF file.

Clients ask one request after another, each with a prompt of its own, and read streamed answers of a fixed length. The
servers take turns; both run all the time, and the one that waits does nothing. Prompts are token ids, so that both
compute the same. Then, on our server alone: prompts with a common beginning with and without the prefix cache, answers
that obey a JSON schema against free ones, and what a token costs beside the model.

llama.cpp's server is built from the source that the package llama-cpp-python carries:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xzf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_SERVER=ON \\
        -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF && cmake --build build --target llama-server

    python benchmarks/serve_vs_llamacpp.py --llama-server build/bin/llama-server [--clients 1 8 32] [--write]
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from http_load import Load, Server, is_healthy, load, metric
from performance_page import machine, write_section
from quantised_files import gguf_file

OPENBOOK = str(Path(sys.executable).with_name("openbook"))
PROMPT_TOKENS = NEW_TOKENS = 128
PREFIX_TOKENS = 400
TARGETS = {1: 1.2, 8: 1.5, 32: 2.0}
# Some ids that every vocabulary has and that are no control tokens.
FIRST_ID, LAST_ID = 1000, 40000
_seeds = itertools.count(1)

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "friends": {"type": "array", "items": {"type": "string"}, "minItems": 3},
    },
    "required": ["name", "age", "friends"],
    "additionalProperties": False,
}


def body(prompt: list[int], num_new: int = NEW_TOKENS, **changes: Any) -> dict[str, Any]:
    """A request that both servers understand: greedy, exactly `num_new` tokens."""
    return {
        "model": "model",
        "prompt": prompt,
        "max_tokens": num_new,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        **changes,
    }


def draw(num_tokens: int) -> list[int]:
    """Token ids that no request had before."""
    ids: list[int] = np.random.default_rng(next(_seeds)).integers(FIRST_ID, LAST_ID, num_tokens).tolist()
    return ids


def ours(path: Path, *options: str) -> Server:
    """`openbook serve`, in the exact profile, as it is by itself: a thread for each core."""
    command = [OPENBOOK, "serve", str(path), "--served-name", "model", "--port", "PORT"]
    return Server([*command, "--cache-memory", "2GB", *options], is_healthy)


def theirs(program: str, path: Path, threads: int, num_slots: int) -> Server:
    """llama.cpp's server with as many slots as there are clients at most."""
    context = num_slots * (PROMPT_TOKENS + NEW_TOKENS + 16)
    command = [program, "-m", str(path), "--port", "PORT", "-t", str(threads), "-tb", str(threads)]
    return Server([*command, "-np", str(num_slots), "-c", str(context)], is_healthy)


def run(server: Server, num_clients: int, num_requests: int) -> Load:
    """Requests of `PROMPT_TOKENS` in and `NEW_TOKENS` out."""
    return load(server.port, "/v1/completions", num_clients, [body(draw(PROMPT_TOKENS)) for _ in range(num_requests)])


def compare(arguments: argparse.Namespace, path: Path) -> list[str]:
    """Requests a minute of both servers."""
    rows = [
        "| clients | Openbook requests/min | llama.cpp requests/min | ratio | target | first token, s | llama.cpp, s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(rows), flush=True)
    for clients in arguments.clients:
        num_requests = max(3, 2 * clients)
        with (
            ours(path) as mine,
            theirs(arguments.llama_server, path, arguments.threads, clients) as other,
        ):
            sides = (mine, other)
            for server in sides:
                run(server, clients, clients)
            rounds = []
            for _ in range(arguments.rounds):
                rounds.append([run(server, clients, num_requests) for server in sides])
                time.sleep(0.2)
        speeds = [[side.requests_per_minute for side in pair] for pair in rounds]
        ratio = statistics.median(a / b for a, b in speeds)
        a, b = (statistics.median(side) for side in zip(*speeds, strict=True))
        firsts = [statistics.median(pair[side].first_s for pair in rounds) for side in range(2)]
        target = TARGETS.get(clients, "")
        rows.append(f"| {clients} | {a:.1f} | {b:.1f} | {ratio:.2f} | {target} | {firsts[0]:.2f} | {firsts[1]:.2f} |")
        print(rows[-1], flush=True)
    return rows


def prefix_ratio(arguments: argparse.Namespace, path: Path) -> float:
    """How many times faster requests behind a common prefix of 400 tokens are with the prefix cache than without."""
    times: list[list[float]] = [[], []]
    with ours(path) as cached, ours(path, "--no-prefix-cache") as uncached:
        for _ in range(arguments.rounds + 1):
            for side, server in enumerate((cached, uncached)):
                prefix = draw(PREFIX_TOKENS)
                bodies = [body(prefix + draw(8), 8) for _ in range(9)]
                load(server.port, "/v1/completions", 1, bodies[:1])
                times[side].append(load(server.port, "/v1/completions", 1, bodies[1:]).total_s)
    return statistics.median(b / a for a, b in zip(times[0][1:], times[1][1:], strict=True))


def schema_ratio(arguments: argparse.Namespace, path: Path) -> float:
    """Seconds a token of answers that obey a schema over those of free ones, 8 clients."""
    ratios = []
    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}}
    form["ignore_eos"] = False  # type: ignore[assignment]
    with ours(path) as server:
        for number in range(arguments.rounds + 1):
            seconds = []
            for changes in ({}, form):
                bodies = [body(draw(PROMPT_TOKENS), **changes) for _ in range(16)]
                before = metric(server.port, "openbook_engine_new_tokens_total")
                taken_s = load(server.port, "/v1/completions", 8, bodies).total_s
                seconds.append(taken_s / (metric(server.port, "openbook_engine_new_tokens_total") - before))
            if number:  # the first compiles the schema
                ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)


def overhead_ms(arguments: argparse.Namespace, path: Path) -> float:
    """Milliseconds of wall time a token that 32 streams take beside the model."""
    costs = []
    with ours(path) as server:
        for number in range(arguments.rounds + 1):
            before = metric(server.port, "openbook_engine_model_seconds_total")
            found = run(server, 32, 32)
            model_s = metric(server.port, "openbook_engine_model_seconds_total") - before
            if number:
                costs.append(1000 * (found.total_s - model_s) / (32 * NEW_TOKENS))
    return statistics.median(costs)


def main() -> None:
    """Measure, print, and with --write put it into docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", default=shutil.which("llama-server"), help="path of llama.cpp's server")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--type", default="Q8_0", help="of the weights of SmolLM2-135M")
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp; ours takes all cores")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=Path, help="folder to keep the GGUF file in")
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    arguments = parser.parse_args()
    if arguments.llama_server is None:
        parser.error("llama-server is not on the path: build it (see above) and give --llama-server")
    with tempfile.TemporaryDirectory() as folder:
        path = gguf_file(arguments.files or Path(folder), "135M", arguments.type)
        rows = compare(arguments, path)
        rest = [
            f"- {PREFIX_TOKENS} shared tokens of prompt, 8 of its own, 8 new ones: with the prefix cache "
            f"{prefix_ratio(arguments, path):.1f} times as fast as without (target 3).",
            f"- Answers that obey a JSON schema, 8 clients: a token takes {schema_ratio(arguments, path):.2f} times as "
            "long as a free one (target: at most 1.15).",
            f"- What is not the model, 32 streams: {overhead_ms(arguments, path):.2f} ms of wall time a token (target: "
            "below 0.5).",
        ]
    print("\n".join(rest), flush=True)
    if arguments.write:
        note = (
            f"SmolLM2-135M {arguments.type}, exact profile, {arguments.threads} threads, {PROMPT_TOKENS} tokens in and "
            f"{NEW_TOKENS} out, streamed; median of {arguments.rounds} alternating rounds "
            "(`python benchmarks/serve_vs_llamacpp.py --write`)."
        )
        write_section("Serving against llama.cpp", "\n".join([machine(), "", note, "", *rows, "", *rest]))


if __name__ == "__main__":
    main()
