"""What a model will take of memory, worked out before its weights are read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from openbook.checkpoint.model_files import is_gguf, weight_files
from openbook.checkpoint.safetensors_io import read_header
from openbook.core.errors import UserError
from openbook.models.config import ModelConfig
from openbook.models.sizes import cache_bytes, longest_context

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
# A context that any use needs; also the number of tokens that are taken to be computed at once.
LEAST_CONTEXT = 2048

# In the names of safetensors and of GGUF files.
_LAYER = re.compile(r"(?:\blayers|\bblk)\.(\d+)\.")
_WHOLE_NUMBERS = frozenset(("F16", "BF16", "F32", "F64"))


class StoredTensor(NamedTuple):
    """A tensor as its file holds it: number of parameters, and bytes if it stays packed in memory, otherwise None."""

    name: str
    num_parameters: int
    packed_bytes: int | None


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a model takes. dtype: of what is not packed. context: tokens of a sequence, which the cache is for."""

    dtype: str
    context: int
    weight_bytes: int
    cache_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.cache_bytes + self.compute_bytes


def stored_tensors(path: Path, kept: frozenset[str] = frozenset()) -> list[StoredTensor]:
    """The tensors of a Hugging Face folder or a GGUF file, from the headers alone.

    Args:
        kept: names of types that stay in memory as they are stored; beside them experts in narrow formats do.

    Raises:
        UserError: a file is missing or damaged.
    """
    if is_gguf(path):
        from openbook.checkpoint.gguf_io import read_gguf

        return [
            StoredTensor(
                name, math.prod(tensor.shape), tensor.num_bytes if tensor.format.name in kept | {"MXFP4"} else None
            )
            for name, tensor in read_gguf(path).tensors.items()
        ]
    return [tensor for file in weight_files(path) for tensor in _of_safetensors(file, kept)]


def plan_memory(
    path: Path, config: ModelConfig, *, dtype: str = "float32", context: int | None = None, num_sequences: int = 1
) -> MemoryPlan:
    """What the model at `path` takes once it is loaded and answers.

    Args:
        dtype: "float32" or "bfloat16", of weights that are not packed, of the cache and of activations.
        context: tokens of a sequence, prompt and answer together; None: the least that any use needs.
        num_sequences: sequences that advance together.

    Raises:
        UserError: a file is missing or damaged.
    """
    return _plan(stored_tensors(path), config, dtype, _context(config, context), num_sequences)


def require_memory(
    path: Path,
    config: ModelConfig,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    context: int | None = None,
    num_sequences: int = 1,
    dtypes: Mapping[str, int] = ITEM_BYTES,
    kept: frozenset[str] = frozenset(),
    cache_item_bytes: float | None = None,
) -> MemoryPlan:
    """`plan_memory`, refused where it does not fit.

    Args:
        device: whose memory: "cpu", "cuda" or "cuda:N".
        dtypes: those that the user could ask for instead, and bytes of a number in each.
        kept: see `stored_tensors`.
        cache_item_bytes: of a number in the cache, None: as `dtype` has it.

    Raises:
        UserError: it does not fit (with how much is needed, how much there is, and what would fit), or a file is
            missing or damaged.
    """
    tensors = stored_tensors(path, kept)
    context = _context(config, context)
    plan = _plan(tensors, config, dtype, context, num_sequences, cache_item_bytes)
    available = available_memory(device)
    if available is None or plan.total_bytes <= available:
        return plan
    choices = []
    for name in sorted(dtypes, key=lambda name: (name != dtype, -dtypes[name])):
        least = _plan(tensors, config, name, min(LEAST_CONTEXT, context), num_sequences, cache_item_bytes)
        asked = _plan(tensors, config, name, context, num_sequences, cache_item_bytes)
        if asked.total_bytes <= available:
            choices.append(f"dtype {name} ({_gb(asked.total_bytes)})")
        elif least.total_bytes <= available:
            left = available - least.weight_bytes - least.compute_bytes
            item = cache_item_bytes or ITEM_BYTES[name]
            tokens = longest_context(config, left // num_sequences, item) // 256 * 256
            choices.append(f"a context of {tokens:,} tokens" + (f" in dtype {name}" if name != dtype else ""))
    smallest = min(dtypes, key=lambda name: dtypes[name])
    needed = _plan(tensors, config, smallest, min(LEAST_CONTEXT, context), num_sequences, cache_item_bytes).total_bytes
    fix = (
        f"{' or '.join(choices)} would fit"
        if choices
        else (
            f"take a smaller model, or a machine with {_gb(needed)} free ({smallest}, a context of "
            f"{min(LEAST_CONTEXT, context):,} tokens)"
        )
    )
    raise UserError(
        f"the model {path} needs {_gb(plan.total_bytes)} of memory ({_gb(plan.weight_bytes)} of weights in {dtype}, "
        f"{_gb(plan.cache_bytes)} for a context of {context:,} tokens, {_gb(plan.compute_bytes)} to compute), "
        f"{_gb(available)} are free{'' if device == 'cpu' else f' on {device}'}: {fix}"
    )


def available_memory(device: str = "cpu", root: Path = Path("/")) -> int | None:
    """Bytes that a new allocation can have; None where this machine does not say.

    On Linux the least of what the system and the control groups of this process leave; files that are only cached
    count as free. `root` is where /proc and /sys are found.
    """
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    limits = [*_system_memory(root), *_cgroup_memory(root)]
    if limits:
        return max(0, min(limits))
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # AttributeError: Windows has no sysconf
        return None


def _plan(
    tensors: list[StoredTensor],
    config: ModelConfig,
    dtype: str,
    context: int,
    num_sequences: int,
    cache_item_bytes: float | None = None,
) -> MemoryPlan:
    item = ITEM_BYTES[dtype]
    weights = sum(
        tensor.num_parameters * item if tensor.packed_bytes is None else tensor.packed_bytes
        for tensor in tensors
        if _is_kept(tensor.name, config)
    )
    # Of a step over many tokens: the stream and what a layer makes of it at its widest, and the logits in float32.
    num_tokens = min(context, LEAST_CONTEXT)
    heads = config.num_attention_heads * config.head_dim
    step = num_tokens * (4 * config.hidden_size + 2 * heads + 3 * config.intermediate_size) * item
    logits = config.vocab_size * (4 + item)
    # To decode fast, an output matrix that is the embedding too gets a copy in another layout.
    copy = config.vocab_size * config.hidden_size * item if config.tie_word_embeddings else 0
    return MemoryPlan(
        dtype,
        context,
        weights,
        cache_bytes(config, context, cache_item_bytes or item, num_sequences),
        num_sequences * (step + logits) + copy,
    )


def _is_kept(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is loaded: not a tied matrix's second copy, nor a layer behind the last (DeepSeek's draft)."""
    layer = _LAYER.search(name)
    if layer is not None and int(layer[1]) >= config.num_hidden_layers:
        return False
    return not (config.tie_word_embeddings and name in ("lm_head.weight", "output.weight"))


def _context(config: ModelConfig, context: int | None) -> int:
    return min(config.max_position_embeddings, LEAST_CONTEXT if context is None else context)


def _of_safetensors(file: Path, kept: frozenset[str]) -> Iterator[StoredTensor]:
    for name, array in read_header(file).items():
        # Experts in a narrow format are kept so and expanded as used; what is narrow elsewhere is expanded.
        is_packed = array.type_name in kept or (array.type_name not in _WHOLE_NUMBERS and ".experts." in name)
        yield StoredTensor(name, math.prod(array.shape), array.num_bytes if is_packed else None)


def _system_memory(root: Path) -> Iterator[int]:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _cgroup_memory(root: Path) -> Iterator[int]:
    """What each control group around this process leaves; version 2 has one line, "0::/path", version 1 several."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mount, names, prefix = root / "sys/fs/cgroup", ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            prefix = "total_"
        else:
            continue
        # In a container the path may be that of the host: the group that is seen is then the mount itself.
        inner = [part for part in group.split("/") if part not in ("", "..")]
        for depth in range(len(inner), -1, -1):
            folder = mount.joinpath(*inner[:depth])
            limit, used = (_read(folder / name).strip() for name in names)
            if limit.isdigit() and used.isdigit():
                stat = dict(
                    line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines() if " " in line
                )
                cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield int(limit) - int(used) + cached


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
