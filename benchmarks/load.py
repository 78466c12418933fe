"""How long a model of 0.6 billion parameters takes to its first token: Openbook against Transformers, the same folder.

The folder is made here: the shape of Qwen 3 0.6B with random weights in bfloat16, nano's template, and a tokenizer of
Qwen 3's size (nano's, with merges of pairs of its tokens added). Both sides are fresh processes, started in turn:
import, load tokenizer and weights, render one question, compute one token. They are timed from outside, up to the
token's line. The folder is in the file cache on both sides.

    python benchmarks/load.py [--repeats 7] [--threads N] [--folder DIR] [--write]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from performance_page import machine, write_section

TARGET = 0.6
NUM_TOKENS = 151_643  # of Qwen 3, without its control tokens
QUESTION = "Find the Greatest Common Divisor (GCD) of these numbers: 48, 36. Give only the GCD as your final answer."
SHAPE = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
# Each prints the number of prompt tokens and the first token's id.
OPENBOOK = """
import sys, openbook
model = openbook.load(sys.argv[1], dtype="bfloat16")
answer = model.chat(sys.argv[2], max_tokens=1)
print(answer.usage.prompt_tokens, answer.token_ids[0], flush=True)
"""
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
messages = [{"role": "user", "content": sys.argv[2]}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
with torch.inference_mode():
    out = model.generate(**ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
num_prompt = ids["input_ids"].shape[1]
print(num_prompt, int(out[0, num_prompt]), flush=True)
"""


def make_folder(folder: Path) -> None:
    """Write the model."""
    import torch

    from openbook.checkpoint.folder import save_model
    from openbook.checkpoint.locate import locate
    from openbook.models.base import init_weights
    from openbook.models.registry import build_model, config_from_hf
    from openbook.ops.torch_ops import TorchOps

    model = build_model(config_from_hf(SHAPE, "the benchmark"), TorchOps()).to(torch.bfloat16)
    init_weights(model, 0)
    save_model(model, folder)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(locate("nano") / name, folder / name)
    definition = json.loads((locate("nano") / "tokenizer.json").read_text())
    widen(definition)
    (folder / "tokenizer.json").write_text(json.dumps(definition))


def widen(definition: dict[str, Any]) -> None:
    """Add merges of pairs of tokens to a tokenizer.json until it has Qwen 3's number of tokens."""
    vocab, merges = definition["model"]["vocab"], definition["model"]["merges"]
    for left, right in itertools.product(list(vocab), repeat=2):
        if len(vocab) == NUM_TOKENS:
            break
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append([left, right])
    for index, token in enumerate(definition["added_tokens"]):
        token["id"] = len(vocab) + index


def first_token_s(program: str, folder: Path, threads: int | None) -> tuple[float, list[int]]:
    """Seconds from the start of the process to its line, and the numbers in it.

    Raises:
        SystemExit: it failed; what it said is printed.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-c", program, str(folder), QUESTION]
    began_s = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began_s
        error = process.stderr.read()
    if process.returncode != 0 or not line:
        raise SystemExit(f"one side failed: {error.strip() or 'no output'}")
    return seconds, [int(number) for number in line.split()]


def main() -> None:
    """Measure, print the ratio, and with --write put it into docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="processes of each kind (default: 7)")
    parser.add_argument("--threads", type=int, help="threads of each side (default: as torch chooses)")
    parser.add_argument("--folder", type=Path, help="keep the model there (1.2 GB), and use it if it is there")
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "model"
        if not (folder / "config.json").exists():
            make_folder(folder)
        sides = {"openbook": OPENBOOK, "transformers": TRANSFORMERS}
        seen = {
            side: first_token_s(program, folder, arguments.threads)[1] for side, program in sides.items()
        }  # fills the file cache
        if seen["openbook"] != seen["transformers"]:
            raise SystemExit(f"the sides differ in prompt length or first token: {seen}")
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(arguments.repeats):
            for side, program in sides.items():
                times[side].append(first_token_s(program, folder, arguments.threads)[0])
    ours_s, theirs_s = (statistics.median(times[side]) for side in sides)
    ratio = ours_s / theirs_s
    if arguments.json:
        print(json.dumps({"openbook_s": ours_s, "transformers_s": theirs_s, "ratio": ratio, "target": TARGET, **times}))
    else:
        print(f"openbook      {ours_s:.2f} s  (median of {arguments.repeats}, best {min(times['openbook']):.2f})")
        print(f"transformers  {theirs_s:.2f} s  (best {min(times['transformers']):.2f})")
        print(f"ratio         {ratio:.2f}  (target: at most {TARGET})")
    if arguments.write:
        threads = f", {arguments.threads} thread(s)" if arguments.threads else ""
        body = f"""From process start to the first token of a Qwen 3 of 0.6 billion parameters in bfloat16: random
weights in the file cache, {seen["openbook"][0]} prompt tokens{threads}; median of {arguments.repeats} processes a
side, started in turn (`python benchmarks/load.py --write`; {machine()}).

| process | seconds |
| --- | --- |
| Openbook: `openbook.load`, then one token | {ours_s:.2f} |
| Transformers: `from_pretrained`, then one token | {theirs_s:.2f} |
| ratio (target: at most {TARGET}) | {ratio:.2f} |"""
        write_section("Loading against Transformers", body)


if __name__ == "__main__":
    main()
