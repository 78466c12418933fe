"""Damaged GGUF, safetensors and config files: whatever stands in them, a reader returns or raises one UserError line.

`python tests/fuzz_readers.py --minutes 10` goes on for that long and keeps what fails in a folder; a few hundred cases
run with the other tests. A case is made of a seed alone, so a failure can be run again: `--case gguf:123`.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from openbook.checkpoint.folder import load_config, load_model
from openbook.checkpoint.gguf_io import FORMATS, BlockFormat, TensorPlan, write_gguf
from openbook.checkpoint.gguf_map import load_gguf
from openbook.checkpoint.gguf_names import TABLES
from openbook.checkpoint.key_convert import PLAIN_DTYPES
from openbook.checkpoint.model_source import open_model
from openbook.checkpoint.raw_matrix import RawMatrix
from openbook.checkpoint.raw_weights import RAW_FAMILIES, RawWeights
from openbook.checkpoint.safetensors_io import RawFiles, load_tensors
from openbook.core.errors import UserError
from openbook.models.published import PUBLISHED
from openbook.models.registry import config_from_hf
from openbook.ops.torch_ops import TorchOps

MOST_SECONDS = 10.0  # of the processor, for one case
MOST_BYTES = 2**30  # beside what is held before

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
# More of what config.json files say, each to be taken into some cases.
MORE: dict[str, Any] = {
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 1e4},
    "sliding_window": 4,
    "layer_types": ["full_attention"],
    "attention_bias": False,
    "hidden_act": "silu",
    "quantization_config": {"quant_method": "mxfp4"},
    "num_experts": 4,
    "n_routed_experts": 4,
    "n_layer": 1,
    "n_embd": 32,
    "n_head": 2,
    "n_positions": 16,
    "vision_config": {"depth": 1, "embed_dim": 32},
}
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gpt2", "gpt_oss"),
    *("deepseek_v2", "deepseek_v3", "qwen2_vl", "gpt5"),
)
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 7, 2**31, 2**63, 2**70, -(2**63), 0.5, -0.0, 1e-300, 1e300),
    *(float("nan"), float("inf"), "", "x", "\ud800", "gelu", [], [0], ["sliding_attention"], {}, {"rope_type": "x"}),
    *({"factor": -1}, [[[]]], "9" * 50),
)


_GGUF_COUNTS = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "expert_count", "expert_used_count", "attention.kv_lora_rank", "expert_shared_count"),
    *("attention.key_length_mla", "attention.value_length_mla", "expert_feed_forward_length"),
    *("attention.sliding_window", "rope.scaling.original_context_length"),
)


def llama_tensors() -> dict[str, torch.Tensor]:
    """The weights of LLAMA under Hugging Face's names."""
    shapes = {
        "model.embed_tokens.weight": (8, 32),
        "model.layers.0.input_layernorm.weight": (32,),
        "model.layers.0.self_attn.q_proj.weight": (32, 32),
        "model.layers.0.self_attn.k_proj.weight": (16, 32),
        "model.layers.0.self_attn.v_proj.weight": (16, 32),
        "model.layers.0.self_attn.o_proj.weight": (32, 32),
        "model.layers.0.post_attention_layernorm.weight": (32,),
        "model.layers.0.mlp.gate_proj.weight": (32, 32),
        "model.layers.0.mlp.up_proj.weight": (32, 32),
        "model.layers.0.mlp.down_proj.weight": (32, 32),
        "model.norm.weight": (32,),
    }
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def gguf_bytes(rng: random.Random, folder: Path) -> bytes:
    """A sound file of some architecture, with some of its tensors in formats of all kinds."""
    name = rng.choice(list(TABLES))
    numbers = dict.fromkeys(_GGUF_COUNTS, 2) | {"embedding_length": 32, "attention.key_length": 16}
    numbers |= {"attention.value_length": 16, "rope.dimension_count": 8 if name == "deepseek2" else 16}
    if name == "llama":
        numbers["expert_count"] = 0
    floats = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.scaling.factor")
    metadata: dict[str, Any] = {"general.architecture": name, "tokenizer.ggml.tokens": ["a", "bc"], "flag": True}
    metadata |= {f"{name}.{key}": value for key, value in numbers.items()}
    metadata |= {f"{name}.{key}": 0.5 for key in floats}
    metadata[f"{name}.rope.scaling.type"] = rng.choice(("none", "linear", "yarn", "x"))
    sources = sorted({source.format(layer=0) for rule in TABLES[name] for source in rule.gguf})
    plans, data = [], []
    for tensor in {"token_embd.weight", *rng.sample(sources, rng.randint(1, len(sources)))}:
        block_format: BlockFormat = rng.choice(list(FORMATS.values()))
        row = max(32, block_format.block_size)
        shape = (2, row) if tensor == "token_embd.weight" else rng.choice(((row,), (2, row), (4, row), (2, 2, row)))
        if "_exps.weight" in tensor:
            shape = (2, 2, row)
        plans.append(TensorPlan(tensor, shape, block_format))
        data.append(np.frombuffer(rng.randbytes(block_format.num_bytes(shape)), dtype=np.uint8))
    write_gguf(folder / "seed.gguf", metadata, plans, data)
    return (folder / "seed.gguf").read_bytes()


def damaged(rng: random.Random, data: bytes) -> bytes:
    """`data` with a few places changed, mostly near the start, where headers stand."""
    out = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 4, 16))):
        place = rng.randrange(min(len(out), rng.choice((64, 1024, len(out)))) or 1) if out else 0
        kind = rng.randrange(7)
        if kind == 0 and out:
            out[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            value = rng.choice((0, 1, 2, 255, 2**15, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
            size = rng.choice((1, 4, 8))
            out[place : place + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
        elif kind == 2:
            out[place : place + rng.randrange(1, 40)] = b""
        elif kind == 3:
            out[place:place] = rng.randbytes(rng.randrange(1, 40))
        elif kind == 4:
            source = rng.randrange(len(out)) if out else 0
            out[place:place] = out[source : source + rng.randrange(1, 200)]
        elif kind == 5:
            del out[rng.randrange(len(out) + 1) :]
        else:
            out[place : place + 8] = rng.randbytes(8)
    return bytes(out)


def try_gguf(rng: random.Random, folder: Path) -> None:
    path = folder / "case.gguf"
    path.write_bytes(damaged(rng, gguf_bytes(rng, folder)))
    values, tensors = load_gguf(path, torch.bfloat16 if rng.random() < 0.5 else torch.float32)
    reached["gguf tensors"] += len(tensors)
    raw = open_model(path).raw_matrices() if values["model_type"] in RAW_FAMILIES else {}
    for name in tensors:
        # Every tensor, whatever becomes of the others.
        try:
            tensor = tensors[name]
        except UserError as error:
            require_one_line(error)
            if raw:
                require_refused(lambda name=name: raw[name])
            continue
        if raw:
            require_same(raw[name], tensor)
    config_from_hf(values, str(path))


def try_safetensors(rng: random.Random, folder: Path) -> None:
    data = safetensors.torch.save(llama_tensors() if rng.random() < 0.5 else {"w": torch.ones(2, 3)})
    if rng.random() < 0.5:  # a changed header of the right length
        (size,) = struct.unpack_from("<Q", data)
        header = json.dumps(changed(rng, json.loads(data[8 : 8 + size]))).encode()
        data = struct.pack("<Q", len(header)) + header + data[8 + size :]
    else:
        data = damaged(rng, data)
    path = folder / "model.safetensors"
    path.write_bytes(data)
    try:
        tensors = load_tensors(path)
    except UserError:
        require_refused(lambda: RawFiles([path], "the model"))
        raise
    raw = RawFiles([path], "the model")
    assert set(raw) == set(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype in PLAIN_DTYPES:
            require_same(raw[name], tensor)
        else:
            require_refused(lambda name=name: raw[name])


def try_config(rng: random.Random, folder: Path) -> None:
    values = dict(LLAMA)
    if rng.random() < 0.8:
        values = dict(rng.choice(list(PUBLISHED.values())).values)
        values |= {key: 2 for key in ("num_hidden_layers", "n_layer") if key in values}
        if "layer_types" in values:
            values["layer_types"] = values["layer_types"][:2]
    if rng.random() < 0.2:
        values |= {key: value for key, value in MORE.items() if rng.random() < 0.15}
    if rng.random() < 0.1:
        values["model_type"] = rng.choice(FAMILIES)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        values = changed(rng, values)
    text = json.dumps(values).encode()
    (folder / "config.json").write_bytes(damaged(rng, text) if rng.random() < 0.3 else text)
    config = load_config(folder)
    if config.num_hidden_layers <= 8 and config.vocab_size <= 64:
        (folder / "model.safetensors").write_bytes(safetensors.torch.save(llama_tensors()))
        load_both(folder)


def try_index(rng: random.Random, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA))
    tensors = llama_tensors()
    safetensors.torch.save_file(tensors, folder / "a.safetensors")
    index: Any = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "a.safetensors")}
    for _ in range(rng.choice((0, 1, 2))):
        index = changed(rng, index)
    text = json.dumps(index).encode()
    (folder / "model.safetensors.index.json").write_bytes(damaged(rng, text) if rng.random() < 0.3 else text)
    load_both(folder)


def load_both(folder: Path) -> None:
    """Load a model with torch and, of a dense family, as stored: both are the same, or both refused."""
    source = open_model(folder)
    is_dense = source.config.model_type in RAW_FAMILIES
    try:
        model = load_model(source, TorchOps())
    except UserError:
        if is_dense:
            require_refused(lambda: [RawWeights(source)[name] for name in RawWeights(source)])
        raise
    if is_dense:
        weights = RawWeights(source)
        for name, parameter in model.state_dict().items():
            whole = np.concatenate([part.floats() for part in weights[name]])
            np.testing.assert_array_equal(whole, parameter.numpy(), name)
        reached["models loaded twice"] += 1


def require_same(raw: RawMatrix, tensor: torch.Tensor) -> None:
    with np.errstate(all="ignore"):
        expected = tensor.float().numpy()
        given = torch.from_numpy(raw.floats().copy()).to(tensor.dtype).float().numpy()
    np.testing.assert_array_equal(given, expected)


def require_refused(read: Callable[[], Any]) -> None:
    try:
        read()
    except UserError as error:
        require_one_line(error)
        return
    raise AssertionError("it was read as stored, and refused as tensors")


def changed(rng: random.Random, value: Any) -> Any:
    """JSON with one place in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        copy = dict(value)
        if rng.random() < 0.15:
            del copy[key]
        elif rng.random() < 0.15:
            copy[key + rng.choice(("x", "", "\x00"))] = rng.choice(JUNK)
        else:
            copy[key] = changed(rng, copy[key])
        return copy
    if isinstance(value, list) and value and rng.random() < 0.7:
        index = rng.randrange(len(value))
        return [*value[:index], changed(rng, value[index]), *value[index + rng.randrange(2) :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.3:
        return rng.choice((value + 1, value * 2, -value, value / 2, str(value)))
    return rng.choice(JUNK)


reached: Counter[str] = Counter()

TARGETS: dict[str, Callable[[random.Random, Path], None]] = {
    "gguf": try_gguf,
    "safetensors": try_safetensors,
    "config": try_config,
    "index": try_index,
}


def require_one_line(error: UserError) -> None:
    text = str(error)
    assert text and "\n" not in text and len(text) < 2000, text[:500]


def run_case(target: str, seed: int, folder: Path) -> bool:
    """Run one case in an empty folder; whether the input was read. Anything but a UserError line comes through."""
    started = time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        TARGETS[target](random.Random(f"{target}:{seed}"), folder)
        is_read = True
    except UserError as error:
        require_one_line(error)
        is_read = False
    assert time.process_time() - started < MOST_SECONDS, "it took too long"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES, "it took too much memory"
    return is_read


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10.0, help="CPU minutes for all targets together")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", help="one case, as TARGET:NUMBER")
    arguments = parser.parse_args()
    if arguments.case:
        target, _, seed = arguments.case.partition(":")
        with tempfile.TemporaryDirectory() as name:
            print("read" if run_case(target, int(seed), Path(name)) else "refused")
        return 0
    counts = {target: [0, 0] for target in TARGETS}
    failures = 0
    seed = arguments.seed
    while time.process_time() < arguments.minutes * 60:
        for target in TARGETS:
            with tempfile.TemporaryDirectory() as name:
                try:
                    counts[target][run_case(target, seed, Path(name))] += 1
                except Exception:
                    failures += 1
                    print(f"{target}:{seed} failed", traceback.format_exc(limit=-4), sep="\n", flush=True)
        seed += 1
    for target, (refused, read) in counts.items():
        print(f"{target}: {refused:,} refused in one line, {read:,} read")
    print(f"gguf: {reached['gguf tensors']:,} tensors expanded or refused")
    print(f"config, index: {reached['models loaded twice']:,} models loaded, and the same as stored")
    print(f"{failures} failures in {time.process_time() / 60:.1f} CPU minutes")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
