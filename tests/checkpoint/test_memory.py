"""Memory before loading: what is counted, what a machine has, and the one line where both do not fit."""

from __future__ import annotations

import struct
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
import torch

from openbook.checkpoint import memory as module
from openbook.checkpoint.folder import load_model, save_model
from openbook.checkpoint.locate import locate
from openbook.checkpoint.memory import (
    StoredTensor,
    available_memory,
    plan_memory,
    require_memory,
    stored_tensors,
)
from openbook.core.errors import UserError
from openbook.engine.torch_runner import load_runner
from openbook.models.base import init_weights
from openbook.models.config import DecoderConfig
from openbook.models.context import CachedContext
from openbook.models.registry import build_model
from openbook.models.sizes import cache_bytes
from openbook.ops.torch_ops import TorchOps

CONFIG = DecoderConfig(
    model_type="llama",
    vocab_size=5000,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=40_000,
    sliding_window=100,
    layer_types=("sliding_attention", "full_attention", "sliding_attention"),
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build_model(CONFIG, TorchOps())
    init_weights(model, 0)
    path = tmp_path_factory.mktemp("memory") / "model"
    save_model(model, path)
    return path


def refusal(folder: Path, available: int, monkeypatch: pytest.MonkeyPatch, **options: object) -> str:
    monkeypatch.setattr(module, "available_memory", lambda device: available)
    with pytest.raises(UserError) as caught:
        require_memory(folder, CONFIG, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_are_counted_as_they_are_loaded(folder: Path, dtype: str, torch_dtype: torch.dtype) -> None:
    model = load_model(folder, TorchOps(), dtype=torch_dtype)
    assert plan_memory(folder, CONFIG, dtype=dtype).weight_bytes == sum(p.nbytes for p in model.parameters())


def test_what_is_not_loaded_is_not_counted(tmp_path: Path) -> None:
    """A tied matrix that is stored twice, and DeepSeek's draft layer behind the last one."""
    tied = msgspec.structs.replace(CONFIG, tie_word_embeddings=True)
    tensors = {
        "model.embed_tokens.weight": torch.zeros(50, 4),
        "lm_head.weight": torch.zeros(50, 4),
        "model.layers.2.mlp.up_proj.weight": torch.zeros(3, 5),
        "model.layers.3.mlp.up_proj.weight": torch.zeros(3, 5),
    }
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert plan_memory(tmp_path, tied).weight_bytes == 4 * (200 + 15)
    assert plan_memory(tmp_path, CONFIG).weight_bytes == 4 * (400 + 15)


@pytest.mark.parametrize("num_tokens", [7, 100, 300])
def test_the_cache_is_counted_as_it_grows(num_tokens: int) -> None:
    """What the engine allocates is ours plus one spare slot a layer, and room to grow by half in full layers."""
    model = build_model(CONFIG, TorchOps())
    init_weights(model, 0)
    context = CachedContext(CONFIG, 2, num_tokens, torch.float32, "cpu")
    context.append([num_tokens, num_tokens])
    with torch.inference_mode():
        model(torch.zeros(2, num_tokens, dtype=torch.int64), context)
    planned = cache_bytes(CONFIG, num_tokens, 4, num_sequences=2)
    spare = cache_bytes(CONFIG, 1, 4, num_sequences=2)
    assert planned + spare == context.num_bytes


def test_a_window_caps_the_cache() -> None:
    a_layer = 2 * (16 + 16) * 2
    assert cache_bytes(CONFIG, 50, 2) == 50 * 3 * a_layer
    assert cache_bytes(CONFIG, 1000, 2) == (1000 + 2 * 100) * a_layer


def test_headers_of_shards(folder: Path, tmp_path: Path) -> None:
    experts = {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(2, 3, 16, dtype=torch.uint8),
        "model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn),
    }
    dense = {"a.weight": torch.zeros(3, 5, dtype=torch.float16), "b.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}
    safetensors.torch.save_file(experts, tmp_path / "1.safetensors")
    safetensors.torch.save_file(dense, tmp_path / "2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    )
    assert sorted(stored_tensors(tmp_path)) == [
        StoredTensor("a.weight", 15, None),
        StoredTensor("b.weight", 4, None),
        StoredTensor("model.layers.0.mlp.experts.0.up_proj.weight", 16, 16),
        StoredTensor("model.layers.0.mlp.experts.gate_up_proj_blocks", 96, 96),
    ]


def test_the_header_of_a_gguf_file() -> None:
    tensors = stored_tensors(locate("smollm2"))
    assert sum(tensor.num_parameters for tensor in tensors) == 134_515_008  # the model card says 135M


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\1",
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{x",
        struct.pack("<Q", 8) + b'{"a": 1}',
        struct.pack("<Q", 33) + b'{"a": {"dtype":"F99","shape":[]}}',
    ],
)
def test_damaged_headers(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError) as caught:
        stored_tensors(tmp_path)
    assert str(caught.value) == (
        f"the weights {tmp_path / 'model.safetensors'} are not a whole safetensors file (its header is damaged): "
        "copy or download the file again"
    )


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        stored_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"has its weights only as pickle \(pytorch_model.bin\)"):
        stored_tensors(tmp_path)


def test_what_fits_passes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_memory(folder, CONFIG, context=30_000)
    monkeypatch.setattr(module, "available_memory", lambda device: plan.total_bytes)
    assert require_memory(folder, CONFIG, context=30_000) == plan
    monkeypatch.setattr(module, "available_memory", lambda device: None)
    assert require_memory(folder, CONFIG, context=30_000) == plan
    assert plan_memory(folder, CONFIG, context=10**9).context == CONFIG.max_position_embeddings


def test_another_dtype_or_a_shorter_context(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = plan_memory(folder, CONFIG, context=40_000)
    narrow = plan_memory(folder, CONFIG, context=40_000, dtype="bfloat16")
    least = plan_memory(folder, CONFIG)
    available = asked.total_bytes - 4_000_000
    assert narrow.total_bytes < available and least.total_bytes < available
    message = refusal(folder, available, monkeypatch, context=40_000)
    head, _, fix = message.partition(" are free: ")
    assert head == (
        f"the model {folder} needs {asked.total_bytes / 1e6:.1f} MB of memory ({asked.weight_bytes / 1e6:.1f} MB of "
        f"weights in float32, {asked.cache_bytes / 1e6:.1f} MB for a context of 40,000 tokens, "
        f"{asked.compute_bytes / 1e6:.1f} MB to compute), {available / 1e6:.1f} MB"
    )
    assert fix == f"a context of 24,320 tokens or dtype bfloat16 ({narrow.total_bytes / 1e6:.1f} MB) would fit"
    shorter = plan_memory(folder, CONFIG, context=24_320)
    assert shorter.total_bytes <= available < plan_memory(folder, CONFIG, context=24_576).total_bytes


def test_only_a_shorter_context_in_another_dtype(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    available = plan_memory(folder, CONFIG, dtype="bfloat16", context=4096).total_bytes
    assert available < plan_memory(folder, CONFIG).total_bytes
    message = refusal(folder, available, monkeypatch, context=40_000)
    assert message.endswith(" MB are free: a context of 4,096 tokens in dtype bfloat16 would fit")


def test_nothing_fits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    least = plan_memory(folder, CONFIG, dtype="bfloat16").total_bytes
    message = refusal(folder, 1_000_000, monkeypatch, device="cuda:0")
    assert message.endswith(
        f", 1.0 MB are free on cuda:0: take a smaller model, or a machine with {least / 1e6:.1f} MB free "
        "(bfloat16, a context of 2,048 tokens)"
    )


def test_loading_is_refused_before_a_weight_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_memory", lambda device: 1_000_000)
    monkeypatch.setattr("openbook.engine.torch_runner.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"^the model .* needs 9.1 MB of memory .* 1.0 MB are free: "):
        load_runner(folder, "cpu", "float32")


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 1 kB\nMemAvailable:    7000 kB\n"}


def test_memory_of_a_machine(tmp_path: Path) -> None:
    write(tmp_path, **MEMINFO)
    assert available_memory(root=tmp_path) == 7000 * 1024


def test_memory_of_a_control_group(tmp_path: Path) -> None:
    """Version 2: the tightest of the group and those around it; file cache counts as free."""
    group = "sys/fs/cgroup/a/b"
    write(tmp_path, **MEMINFO, **{"proc/self/cgroup": "0::/a/b\n"})
    write(tmp_path, **{f"{group}/memory.max": "max\n", f"{group}/memory.current": "100\n"})
    assert available_memory(root=tmp_path) == 7000 * 1024
    outer = "sys/fs/cgroup/a"
    write(tmp_path, **{f"{outer}/memory.max": "5000\n", f"{outer}/memory.current": "4000\n"})
    assert available_memory(root=tmp_path) == 1000
    write(tmp_path, **{f"{outer}/memory.stat": "anon 3300\ninactive_file 600\nactive_file 100\n"})
    assert available_memory(root=tmp_path) == 1700
    write(tmp_path, **{f"{outer}/memory.current": "9000\n"})
    assert available_memory(root=tmp_path) == 0


def test_memory_of_a_control_group_of_version_1(tmp_path: Path) -> None:
    """In a container the path is that of the host and the group is seen at the mount."""
    mount = "sys/fs/cgroup/memory"
    write(tmp_path, **MEMINFO, **{"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n"})
    write(tmp_path, **{f"{mount}/memory.limit_in_bytes": "6000\n", f"{mount}/memory.usage_in_bytes": "5000\n"})
    write(tmp_path, **{f"{mount}/memory.stat": "inactive_file 7\ntotal_inactive_file 30\ntotal_active_file 20\n"})
    assert available_memory(root=tmp_path) == 1050


def test_a_system_without_proc(tmp_path: Path) -> None:
    available = available_memory(root=tmp_path)
    assert available is not None and available > 2**20


def test_this_machine_has_memory() -> None:
    available = available_memory()
    assert available is not None and available > 2**20
