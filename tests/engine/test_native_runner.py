"""The native runner against its specification, the same model through the exact Ops: every logit equal to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from exact_paths import paths
from openbook.checkpoint.folder import save_model
from openbook.checkpoint.model_source import open_model
from openbook.core.errors import UserError
from openbook.engine.choices import Dtype, Profile
from openbook.engine.load import choose_runner
from openbook.engine.model import Model
from openbook.engine.native_load import load_native
from openbook.engine.native_runner import NativeRunner, allocate_cache
from openbook.engine.paged import BLOCK_TOKENS
from openbook.engine.runner import Runner
from openbook.engine.torch_runner import TorchRunner, load_exact_runner
from openbook.models.base import init_weights
from openbook.models.config import DecoderConfig, ModelConfig, RopeScaling
from openbook.models.configs.gpt2 import GPT2Config
from openbook.models.registry import build_model
from openbook.models.sizes import cache_bytes, rounded_item_bytes
from openbook.ops.torch_ops import TorchOps

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
YARN = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
CONFIGS: dict[str, ModelConfig] = {
    "llama": DecoderConfig(model_type="llama", tie_word_embeddings=False, **SIZES),
    "mistral": DecoderConfig(model_type="mistral", sliding_window=9, **SIZES),
    "qwen2": DecoderConfig(model_type="qwen2", **SIZES),
    "qwen3": DecoderConfig(model_type="qwen3", rope_scaling=YARN, **SIZES),
    "gpt2": GPT2Config(scale_attn_by_inverse_layer_idx=True, **{**SIZES, "num_key_value_heads": 6}),
}


@dataclass(frozen=True)
class Pair:
    """One model twice."""

    native: NativeRunner
    slow: TorchRunner


@pytest.fixture(
    scope="module", params=[(name, dtype) for name in CONFIGS for dtype in ("float32", "bfloat16")], ids=str
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name, dtype = request.param
    return load_both(make_folder(CONFIGS[name], tmp_path_factory.mktemp("pair"), getattr(torch, dtype)))


def make_folder(config: ModelConfig, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model = build_model(config, TorchOps())
    init_weights(model, 7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases: nothing that a slip could hide behind
                parameter.add_(torch.linspace(-0.4, 0.3, len(parameter)))
    save_model(model.to(dtype), folder)
    return folder


def load_both(folder: Path) -> Pair:
    return Pair(load_native(open_model(folder)), load_exact_runner(open_model(folder)))


def tokens(*shape: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


def test_whole_rows(pair: Pair) -> None:
    ids = tokens(3, 37)
    np.testing.assert_array_equal(pair.native.logits(ids), pair.slow.logits(ids))


def test_a_batch_of_unlike_lengths_and_its_steps(pair: Pair) -> None:
    ids, counts = tokens(3, 41), np.array([41, 3, 18])
    batches = [runner.start(3, 64) for runner in (pair.native, pair.slow)]
    logits = [batch.forward(ids, counts) for batch in batches]
    np.testing.assert_array_equal(*logits)
    for step in range(4):
        chosen = np.arange(3 if step < 2 else 2)
        logits = [batch.forward(tokens(len(chosen), 1, seed=step), np.ones_like(chosen)) for batch in batches]
        np.testing.assert_array_equal(*logits)
        if step == 1:
            for batch in batches:
                batch.keep(np.array([0, 2]))


@pytest.mark.parametrize("piece", [1, 16, 23])
def test_pieces_and_company_change_nothing(pair: Pair, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(1, 60)
    expected = pair.native.logits(ids)[0]
    batch, others = pair.native.start(4, 70), tokens(3, 60, seed=5)
    monkeypatch.setattr("openbook.engine.native_runner.STEP_TOKENS", 50)
    for start in range(0, 60, piece):
        end = min(start + piece, 60)
        part = np.concatenate([others[:2, start:end], ids[:, start:end], others[2:, : end - start]])
        counts = np.full(4, part.shape[1])
        got = batch.forward(part, counts)[2]
        np.testing.assert_array_equal(got, expected[end - 1])


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_every_instruction_set_and_thread_count(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    folder = make_folder(config, tmp_path / "model")
    ids, found = tokens(2, 70), set()
    for _ in paths():
        found.add(load_native(open_model(folder)).logits(ids).tobytes())
    assert len(found) == 1


def test_it_is_close_to_torch(tmp_path: Path) -> None:
    folder = make_folder(CONFIGS["qwen3"], tmp_path / "model")
    ids = tokens(2, 30)
    fast = choose_runner(open_model(folder), "cpu", "float32", None)
    assert fast.profile == "fast"
    np.testing.assert_allclose(load_native(open_model(folder)).logits(ids), fast.logits(ids), atol=2e-4)


@pytest.mark.parametrize(
    ("dtype", "profile", "expected"),
    [
        (None, None, NativeRunner),
        (None, "exact", NativeRunner),
        ("float32", None, TorchRunner),
        (None, "fast", TorchRunner),
    ],
)
def test_which_runner(dtype: Dtype | None, profile: Profile | None, expected: type[Runner], tiny_folder: Path) -> None:
    assert isinstance(choose_runner(open_model(tiny_folder), "cpu", dtype, profile), expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "bfloat16"}, "the dtype bfloat16 was asked for together with the profile exact"),
        ({"device": "cuda"}, "the device cuda was asked for together with the profile exact"),
    ],
)
def test_the_exact_profile_has_its_own_device_and_dtype(
    options: dict[str, str], expected: str, tiny_folder: Path
) -> None:
    with pytest.raises(UserError) as error:
        Model.load(tiny_folder, profile="exact", **options)  # type: ignore[arg-type]
    assert expected in str(error.value) and "use profile fast" in str(error.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_of_8_bits(name: str, tmp_path: Path) -> None:
    config = msgspec.structs.replace(CONFIGS[name], hidden_size=192, head_dim=32, initializer_range=0.1)
    source = open_model(make_folder(config, tmp_path / "model"))
    ids = tokens(2, 50)
    runners = choose_runner(source, "cpu", None, None, "int8"), load_exact_runner(source, "int8")
    found = [runner.logits(ids) for runner in runners]
    np.testing.assert_array_equal(*found)
    plain = load_native(source).logits(ids)
    assert 0 < np.linalg.norm(found[0] - plain) < 0.05 * np.linalg.norm(plain)


def test_who_has_no_choice_of_a_cache(tiny_folder: Path, tmp_path: Path) -> None:
    source = open_model(tiny_folder)
    for arguments in (("cpu", "bfloat16", None), ("cpu", None, "fast")):
        with pytest.raises(UserError) as error:
            choose_runner(source, *arguments, "int8")  # type: ignore[arg-type]
        assert str(error.value) == (
            "the cache int8 was asked for, but only dense decoders in the profile exact have a choice: leave it out"
        )
    with pytest.raises(UserError, match=r"^the cache 'q8' is unknown: expected float32 or int8; correct it$"):
        choose_runner(source, "cpu", None, None, "q8")  # type: ignore[arg-type]
    narrow = open_model(make_folder(CONFIGS["llama"], tmp_path / "narrow"))
    with pytest.raises(UserError) as error:
        load_native(narrow, "int8")
    assert str(error.value) == (
        "the cache int8 rounds 32 features of a head together, this model's heads have 8: use the cache float32"
    )


@pytest.mark.parametrize("options", [[], ["--cache", "int8"]], ids=str)
def test_no_torch_is_imported(options: list[str]) -> None:
    code = (
        "import sys\nfrom openbook.cli.main import main\n"
        f"status = main(['run', 'nano', 'Hello', '--max-tokens', '3', *{options!r}])\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\nprint('done', status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("done 0\n"), done.stderr


def test_without_the_native_core_the_default_is_fast(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise UserError("no native core")

    monkeypatch.setattr("openbook.engine.native_runner.require_native", missing)
    monkeypatch.setattr("openbook.ops.native_module.has_native", lambda: False)
    assert choose_runner(open_model(tiny_folder), "cpu", None, None).profile == "fast"
    with pytest.raises(UserError, match="no native core"):
        choose_runner(open_model(tiny_folder), "cpu", None, "exact")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], None),
        (["--profile", "exact"], "openbook: openbook was installed without a C++ compiler"),
        (["--cache", "int8"], "openbook: openbook was installed without a C++ compiler"),
    ],
    ids=str,
)
def test_a_program_without_the_native_core_answers_or_says_what_is_missing(
    options: list[str], expected: str | None
) -> None:
    code = (
        "import sys\nsys.modules['openbook.ops._native'] = None\nfrom openbook.cli.main import main\n"
        f"sys.exit(main(['run', 'nano', 'Hello', '--max-tokens', '3', *{options!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if expected is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2 and done.stderr.startswith(expected) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_memory_is_planned_for_the_cache_that_is_made(head_dim: int) -> None:
    config = DecoderConfig(model_type="llama", **{**SIZES, "head_dim": head_dim})
    for kind, item_bytes in (("float32", 4.0), ("int8", rounded_item_bytes(config))):
        made = allocate_cache(config, 5, kind)  # type: ignore[arg-type]
        assert sum(array.nbytes for array in made) == cache_bytes(config, 5 * BLOCK_TOKENS, item_bytes)
        assert all(array.ctypes.data % 64 == 0 for array in made if array.dtype == np.uint8)


def test_wrong_indices_are_refused(tiny_folder: Path) -> None:
    runner = load_native(open_model(tiny_folder))
    batch = runner.start(1, 16)
    with pytest.raises(IndexError, match="the token id 9999 is not from 0 to"):
        batch.forward(np.array([[9999]]), np.array([1]))
    batch.forward(tokens(1, 16), np.array([16]))
    with pytest.raises(IndexError, match="the position 16 is not from 0 to 15"):
        batch.forward(np.array([[1]]), np.array([1]))


def test_an_unknown_instruction_set_is_refused(tiny_folder: Path) -> None:
    code = f"import sys\nfrom openbook.cli.main import main\nsys.exit(main(['run', {str(tiny_folder)!r}, 'Hello']))"
    environment = {**os.environ, "OPENBOOK_ISA": "sse"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert 'OPENBOOK_ISA is "sse", expected one that this CPU has: scalar' in done.stderr
