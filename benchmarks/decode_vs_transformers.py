"""Decoding speed: Openbook against Transformers' `generate` on the same weights, greedy, in one process.

Random weights of three small shapes: a dense Qwen 3, a mixture of experts (Qwen 3 MoE) and latent attention (DeepSeek
V2). Both sides decode the same number of tokens behind the same prompts; the ratio is the median over alternating
rounds. Prefill is part of both sides, and short. The dense shape is decoded in both profiles: fast, bfloat16 as on the
other side, and exact, the default, which computes in float32 on the same bfloat16 weights.

    python benchmarks/decode_vs_transformers.py [--shape dense moe mla] [--batch 1 8] [--rounds 5] [--write]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from performance_page import machine, write_section

from openbook.checkpoint.folder import load_config, save_model
from openbook.checkpoint.model_source import open_model
from openbook.engine.choices import Dtype, Profile
from openbook.engine.load import choose_runner
from openbook.engine.runner import Runner
from openbook.models.base import init_weights
from openbook.models.registry import build_model, config_from_hf
from openbook.ops import _native
from openbook.ops.torch_ops import TorchOps

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TARGET = 1.5
VOCAB_SIZE = 32_000
PROMPT_TOKENS = 32
ASLEEP_S = 0.02
# As in config.json; what is left out has the family's defaults.
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {
        "model_type": "qwen3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "moe": {
        "model_type": "qwen3_moe",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "moe_intermediate_size": 384,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "mla": {
        "model_type": "deepseek_v2",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "moe_intermediate_size": 384,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "q_lora_rank": None,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}

# Decodes a number of tokens behind the prompts, int64 [B, T], and returns them, [B][tokens].
Decode = Callable[[np.ndarray, int], list[list[int]]]


def make_folder(values: dict[str, Any], folder: Path) -> None:
    """A model of random bfloat16 weights."""
    model = build_model(config_from_hf(values, "the benchmark's shape"), TorchOps())
    init_weights(model, 1)
    save_model(model.to(torch.bfloat16), folder)


def our_decode(folder: Path, profile: Profile) -> Decode:
    """Openbook's runner, greedy."""
    dtype: Dtype | None = "bfloat16" if profile == "fast" else None
    runner: Runner = choose_runner(open_model(folder), "cpu", dtype, profile)

    def decode(prompts: np.ndarray, num_tokens: int) -> list[list[int]]:
        batch = runner.start(len(prompts), prompts.shape[1] + num_tokens)
        tokens = prompts
        out: list[list[int]] = [[] for _ in prompts]
        for _ in range(num_tokens):
            logits = batch.forward(tokens, np.full(len(tokens), tokens.shape[1]))
            tokens = logits.argmax(-1)[:, None]
            for row, token in zip(out, tokens[:, 0], strict=True):
                row.append(int(token))
        return out

    return decode


def their_decode(folder: Path) -> Decode:
    """Transformers' `generate`, greedy, with its default cache and attention."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None

    def decode(prompts: np.ndarray, num_tokens: int) -> list[list[int]]:
        ids = torch.from_numpy(prompts)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return rows

    return decode


def speed(decode: Decode, prompts: np.ndarray, num_tokens: int) -> float:
    """Tokens a second, all sequences together; first the other side's threads fall asleep."""
    time.sleep(ASLEEP_S)
    began_s = time.perf_counter()
    rows = decode(prompts, num_tokens)
    taken_s = time.perf_counter() - began_s
    return sum(map(len, rows)) / taken_s


def main() -> None:
    """Measure, print a table, and with --write put it into docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each sequence")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    _native.set_num_threads(arguments.threads)
    lines = [
        "| shape | profile | parameters | batch | Openbook tokens/s | Transformers tokens/s | ratio | target |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(lines), flush=True)
    for shape in arguments.shape:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_folder(SHAPES[shape], folder)
            config = load_config(folder)
            num_weights = sum(p.numel() for p in build_model(config, TorchOps(), "meta").parameters())
            theirs = their_decode(folder)
            profiles: tuple[Profile, ...] = ("fast", "exact") if shape == "dense" else ("fast",)
            for profile, batch in itertools.product(profiles, arguments.batch):
                sides = (our_decode(folder, profile), theirs)
                prompts = np.random.default_rng(1).integers(0, VOCAB_SIZE, (batch, PROMPT_TOKENS))
                for side in sides:
                    speed(side, prompts, 8)
                rounds = [[speed(side, prompts, arguments.tokens) for side in sides] for _ in range(arguments.rounds)]
                ratio = statistics.median(mine / other for mine, other in rounds)
                mine, other = (statistics.median(side) for side in zip(*rounds, strict=True))
                size = f"{num_weights / 1e6:.0f}M"
                speeds = f"{mine:,.1f} | {other:,.1f} | {ratio:.2f}"
                lines.append(f"| {shape} | {profile} | {size} | {batch} | {speeds} | {TARGET} |")
                print(lines[-1], flush=True)
    if arguments.write:
        setting = (
            f"Random bfloat16 weights, {arguments.threads} threads, prompts of {PROMPT_TOKENS} tokens, "
            f"{arguments.tokens} new tokens a sequence, greedy; median of {arguments.rounds} alternating rounds."
        )
        write_section("Decoding against Transformers", "\n".join([machine(), "", setting, "", *lines]))


if __name__ == "__main__":
    main()
