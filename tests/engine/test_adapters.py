"""Adapters in the native decoder: the bits of the exact Ops, whatever shares a step, and loading while others run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from exact_paths import paths
from openbook.checkpoint.folder import save_model
from openbook.checkpoint.gguf_map import save_gguf
from openbook.checkpoint.lora import read_adapter
from openbook.checkpoint.model_source import ModelSource, open_model
from openbook.checkpoint.stored_model import load_stored_model
from openbook.core.errors import UserError
from openbook.engine.adapters import ServedAdapters
from openbook.engine.choices import CacheKind
from openbook.engine.native_adapters import NativeAdapters
from openbook.engine.native_load import load_native
from openbook.engine.native_runner import allocate_cache
from openbook.engine.paged import BLOCK_TOKENS
from openbook.models.base import init_weights
from openbook.models.config import DecoderConfig, ModelConfig
from openbook.models.configs.gpt2 import GPT2Config
from openbook.models.context import DenseContext
from openbook.models.layers.lora import ModelAdapters
from openbook.models.registry import build_model, config_to_hf
from openbook.ops.exact_ops import ExactOps
from openbook.ops.torch_ops import TorchOps
from peft_folders import merge, save_adapter

VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.08,
}
CONFIGS: dict[str, ModelConfig] = {
    "llama": DecoderConfig(model_type="llama", tie_word_embeddings=False, **SIZES),
    "mistral": DecoderConfig(model_type="mistral", sliding_window=9, **SIZES),
    "qwen2": DecoderConfig(model_type="qwen2", **{**SIZES, "head_dim": 16}),
    "qwen3": DecoderConfig(model_type="qwen3", **SIZES),
    "gpt2": GPT2Config(**{**SIZES, "num_key_value_heads": 4, "head_dim": 16}),
}
RANKS = {"one": 1, "four": 4, "eight": 8, "forty": 40}
# What shares a step in most tests.
COMPANY = ("four", None, "one", "eight", "forty", "four", None)
TABLE_PAGES = 8


def tokens(*shape: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)


def make_folder(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model = build_model(CONFIGS[name], TorchOps())
    init_weights(model, 7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.linspace(-0.2, 0.3, len(parameter)))
    save_model(model.to(dtype), folder)
    return folder


def make_gguf(name: str, folder: Path, kind: str) -> Path:
    file = folder.with_suffix(f".{kind}.gguf")
    save_gguf(file, config_to_hf(CONFIGS[name]), load_file(folder / "model.safetensors"), {}, kind)
    return file


def save_adapters(folder: Path) -> dict[str, Path]:
    """Beside the model's folder."""
    return {
        name: save_adapter(folder.parent / "adapters" / name, folder, rank=rank, seed=rank)
        for name, rank in RANKS.items()
    }


class Served:
    """A native decoder with adapters, stepped as an engine would: pieces of several sequences at a time."""

    def __init__(
        self, source: ModelSource, adapters: dict[str, Path], num_sequences: int, cache: CacheKind = "float32"
    ) -> None:
        self.runner = load_native(source, cache)
        self.adapters = NativeAdapters(self.runner.decoder)
        for name, path in adapters.items():
            self.adapters.add(read_adapter(path, source.config, name))
        pages = np.random.default_rng(1).permutation(num_sequences * TABLE_PAGES).astype(np.int32)
        self._tables = pages.reshape(num_sequences, TABLE_PAGES)
        self._cache = allocate_cache(source.config, len(pages), cache)
        self._lengths = [0] * num_sequences

    def step(
        self, parts: Sequence[tuple[int, NDArray[np.int32]]], names: Sequence[str | None], is_last_wanted: bool = False
    ) -> list[NDArray[np.float32]]:
        """Append tokens to sequences; of each the logits after its tokens, or after the last one."""
        rows = [row for row, ids in parts for _ in ids]
        positions = [self._lengths[row] + place for row, ids in parts for place in range(len(ids))]
        ends = np.cumsum([len(ids) for _, ids in parts])
        wanted = ends - 1 if is_last_wanted else np.arange(ends[-1])
        logits = np.empty((len(wanted), VOCAB), np.float32)
        self.runner.decoder.step(
            np.concatenate([ids for _, ids in parts]),
            *(np.array(values, np.int32) for values in (positions, rows)),
            self._tables,
            *self._cache,
            *self.runner.rope(TABLE_PAGES * BLOCK_TOKENS),
            wanted.astype(np.int32),
            logits,
            self.adapters.of_sequences(names),
        )
        for row, ids in parts:
            self._lengths[row] += len(ids)
        return np.split(logits, len(parts) if is_last_wanted else ends[:-1])


def whole(
    source: ModelSource, adapters: dict[str, Path], ids: Sequence[NDArray[np.int32]], names: Sequence[str | None]
) -> list[NDArray[np.float32]]:
    """The logits of whole prompts in one step."""
    return Served(source, adapters, len(ids)).step([*enumerate(ids)], names)


def slowly(
    source: ModelSource, adapters: dict[str, Path], ids: Sequence[NDArray[np.int32]], names: Sequence[str | None]
) -> list[NDArray[np.float32]]:
    """The same through the exact Ops, one prompt at a time."""
    model = load_stored_model(source, ExactOps())
    loaded = ModelAdapters(model)
    for name, path in adapters.items():
        loaded.add(read_adapter(path, source.config, name))
    found = []
    with torch.inference_mode():
        for row, name in zip(ids, names, strict=True):
            with loaded.placed([name], [0] * len(row)):
                found.append(model(torch.from_numpy(row.astype(np.int64))[None], DenseContext(1, len(row)))[0].numpy())
    return found


def prompts() -> list[NDArray[np.int32]]:
    """Of unlike lengths, together enough for chunks of rows with several threads."""
    return [tokens(length, seed=length) for length in (61, 3, 80, 17, 1, 90, 33)]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = make_folder(request.param, tmp_path_factory.mktemp("served") / request.param)
    return folder, save_adapters(folder)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = make_folder("qwen3", tmp_path_factory.mktemp("qwen3") / "model")
    return folder, save_adapters(folder)


def test_it_is_as_if_the_adapter_were_merged(model: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    folder, adapters = model
    sources = [open_model(folder)]
    if sources[0].config.model_type == "llama":  # whose files have the rows of q and k in another order
        sources.append(open_model(make_gguf("llama", folder, "F32")))
    ids, names = [tokens(20), tokens(11), tokens(20)], ["eight", "one", None]
    for source in sources:
        plain, adapted = (whole(source, adapters, ids, each) for each in ([None] * 3, names))
        for row, name in enumerate(names):
            merged = folder if name is None else tmp_path / f"{row}-{source.path.stem}"
            if name is not None:
                merge(folder, adapters[name], merged)
            expected = whole(open_model(merged), {}, ids, [None] * 3)[row]
            np.testing.assert_allclose(adapted[row], expected, atol=1e-5, rtol=0)
            assert (np.abs(adapted[row] - plain[row]).max() > 0.05) == (name is not None)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "Q8_0", "Q4_0"])
def test_the_exact_ops_agree_to_the_bit(model: tuple[Path, dict[str, Path]], kind: str, tmp_path: Path) -> None:
    folder, adapters = model
    name = open_model(folder).config.model_type
    if kind == "bfloat16":
        folder = make_folder(name, tmp_path / "narrow", torch.bfloat16)
    source = open_model(make_gguf(name, folder, kind) if kind.startswith("Q") else folder)
    for found, expected in zip(
        whole(source, adapters, prompts(), COMPANY), slowly(source, adapters, prompts(), COMPANY), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["float32", "Q8_0"])
def test_every_instruction_set_and_thread_count(qwen3: tuple[Path, dict[str, Path]], kind: str) -> None:
    folder, adapters = qwen3
    source = open_model(folder if kind == "float32" else make_gguf("qwen3", folder, kind))
    found = set()
    for _ in paths():
        served = Served(source, adapters, len(COMPANY))
        first = served.step([*enumerate(prompts())], COMPANY)
        then = served.step([(row, tokens(1, seed=row)) for row in range(len(COMPANY))], COMPANY, is_last_wanted=True)
        found.add(b"".join(logits.tobytes() for logits in first + then))
    assert len(found) == 1


@pytest.mark.parametrize("kind", ["float32", "Q8_0"])
@pytest.mark.parametrize("cache", ["float32", "int8"])
@pytest.mark.parametrize("chunk", [1, 16, 23, 512])
def test_company_order_and_pieces_change_nothing(
    qwen3: tuple[Path, dict[str, Path]], chunk: int, cache: CacheKind, kind: str
) -> None:
    folder, adapters = qwen3
    source = open_model(folder if kind == "float32" else make_gguf("qwen3", folder, kind))
    alone = [
        Served(source, adapters, 1, cache).step([(0, ids)], [name])[0]
        for ids, name in zip(prompts(), COMPANY, strict=True)
    ]
    order = np.random.default_rng(chunk).permutation(len(COMPANY)).tolist()
    served = Served(source, adapters, len(COMPANY), cache)
    names = [COMPANY[index] for index in order]
    for start in range(0, 90, chunk):
        parts = [(row, prompts()[index][start : start + chunk]) for row, index in enumerate(order)]
        parts = [(row, ids) for row, ids in parts if len(ids)]
        for (row, ids), logits in zip(parts, served.step(parts, names, is_last_wanted=True), strict=True):
            np.testing.assert_array_equal(logits[0], alone[order[row]][start + len(ids) - 1])


def test_adapters_come_and_go_while_others_run(qwen3: tuple[Path, dict[str, Path]]) -> None:
    folder, adapters = qwen3
    source, ids = open_model(folder), tokens(3, 30)
    names = ["eight", None, "one"]
    expected = whole(source, adapters, ids, names)
    served = Served(source, {name: adapters[name] for name in ("four", "eight", "one")}, 4)
    numbers = served.adapters.of_sequences(["four", "eight", "one", None])
    assert numbers is not None and numbers.tolist() == [0, 1, 2, -1]

    def go_on(start: int, end: int) -> None:
        parts = [(row, ids[row][start:end]) for row in range(3)]
        for logits, whole_row in zip(served.step(parts, [*names, None]), expected, strict=True):
            np.testing.assert_array_equal(logits, whole_row[start:end])

    go_on(0, 10)
    served.adapters.remove("four")
    go_on(10, 15)
    served.adapters.add(read_adapter(adapters["forty"], source.config))  # in the place of the one that went
    assert served.adapters.of_sequences(["forty"]) == 0
    go_on(15, 20)
    (late,) = served.step([(3, tokens(9, seed=3))], [None, None, None, "forty"])
    np.testing.assert_array_equal(late, whole(source, adapters, [tokens(9, seed=3)], ["forty"])[0])
    go_on(20, 30)
    for name in served.adapters.names:
        served.adapters.remove(name)
    assert served.adapters.of_sequences([None, None]) is None and served.adapters.of_sequences(()) is None
    plain = whole(source, {}, [tokens(9)], [None])[0]
    fresh = Served(source, adapters, 1)
    np.testing.assert_array_equal(fresh.step([(0, tokens(9))], [None])[0], plain)


def test_what_is_refused(qwen3: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    folder, adapters = qwen3
    source = open_model(folder)
    served = Served(source, adapters, 1)
    with pytest.raises(UserError) as error:
        served.adapters.add(read_adapter(adapters["one"], source.config))
    assert str(error.value) == "an adapter one is loaded already: unload it first, or give another name"
    for act in (served.adapters.remove, lambda name: served.adapters.of_sequences([name])):
        with pytest.raises(UserError) as error:
            act("fours")
        assert str(error.value) == (
            "unknown adapter 'fours': did you mean 'four'? loaded are one, four, eight, forty; load it first"
        )
    gpt2 = make_folder("gpt2", tmp_path / "gpt2")
    other = read_adapter(save_adapter(tmp_path / "other", gpt2), open_model(gpt2).config)
    with pytest.raises(UserError) as error:
        served.adapters.add(other)
    assert str(error.value) == (
        "the adapter other updates model.layers.0.mlp.up_proj, which this model has not in that shape: read it for "
        "this model"
    )
    assert "other" not in served.adapters.names and not served.runner.decoder.has_adapter(4)  # no half of it stays


def test_the_decoder_checks_what_it_is_given(qwen3: tuple[Path, dict[str, Path]]) -> None:
    served = Served(open_model(qwen3[0]), {}, 2)
    decoder, name = served.runner.decoder, "model.layers.0.self_attn.o_proj.weight"
    a, b = np.ones((2, 128), np.float32), np.ones((64, 2), np.float32)
    decoder.set_low_rank(0, name, [(0, a, b[:30]), (30, a[:1], b[:34, :1].copy())])
    fitting = "expected rows 0 to 64, 128 inputs and one rank"
    for arguments, expected in (
        ((1, name, [(0, a, b[:30]), (29, a, b[:1])]), f"rows 29 to 30 of {name} are updated with 128 inputs"),
        ((1, name, [(1, a, b)]), f"rows 1 to 65 of {name} are updated with 128 inputs and ranks 2 and 2: {fitting}"),
        ((1, name, [(0, a[:, :127].copy(), b)]), f"are updated with 127 inputs and ranks 2 and 2: {fitting}"),
        ((1, name, [(-1, a, b)]), f"rows -1 to 63 of {name} are updated"),
        ((1, name, [(0, a[:1], b)]), f"with 128 inputs and ranks 1 and 2: {fitting}"),
        ((1, name, [(0, a[:0], b[:, :0].copy())]), f"with 128 inputs and ranks 0 and 0: {fitting}"),
        ((1, name, []), "expected an adapter from 0 on, and updates"),
        ((-1, name, [(0, a, b)]), "expected an adapter from 0 on, and updates"),
        (
            (1, "model.embed_tokens.weight", [(0, a, b)]),
            "no layer of this decoder has a matrix model.embed_tokens.weight",
        ),
        ((1, "model.norm.weight", [(0, a, b)]), "no layer of this decoder has a matrix model.norm.weight"),
    ):
        with pytest.raises(ValueError, match=expected):
            decoder.set_low_rank(*arguments)
    assert decoder.has_adapter(0) and not decoder.has_adapter(1)
    decoder.remove_adapter(7)  # nothing to forget

    def step(adapters: list[int]) -> None:
        served.adapters.of_sequences = lambda names: np.array(adapters, np.int32)  # type: ignore[method-assign]
        served.step([(0, tokens(3))], [])

    with pytest.raises(IndexError, match="the adapter 1 is not there"):
        step([0, 1])
    with pytest.raises(IndexError, match="the adapter -2 is not there"):
        step([0, -2])
    with pytest.raises(ValueError, match=r"expected adapters \[S\], one for each sequence"):
        step([0])
    step([0, -1])


def test_served_adapters(qwen3: tuple[Path, dict[str, Path]]) -> None:
    folder, adapters = qwen3
    source = open_model(folder)
    place = NativeAdapters(load_native(source).decoder)
    served = ServedAdapters(source.config, place)
    for name in ("tone", "style"):
        served.add(served.read(name, str(adapters["four"])))
    assert served.names == ["tone", "style"] and served.digest("tone") == served.digest("style")
    served.retire("tone")
    assert served.names == ["style"] and place.names == ("tone", "style")
    with pytest.raises(UserError, match="an adapter tone is loaded already"):
        served.add(served.read("tone", str(adapters["one"])))
    served.remove("tone")
    served.add(served.read("tone", str(adapters["one"])))
    assert served.names == ["style", "tone"] and served.digest("tone") != served.digest("style")
    with pytest.raises(UserError, match="has no adapter_config"):
        served.read("none", str(folder))


def test_no_torch_is_imported(qwen3: tuple[Path, dict[str, Path]]) -> None:
    folder, adapters = qwen3
    code = (
        "import sys\nfrom pathlib import Path\nfrom openbook.checkpoint.model_source import open_model\n"
        "from openbook.engine.adapters import ServedAdapters\n"
        "from openbook.engine.native_adapters import NativeAdapters\n"
        f"from openbook.engine.native_load import load_native\nsource = open_model(Path({str(folder)!r}))\n"
        "served = ServedAdapters(source.config, NativeAdapters(load_native(source).decoder))\n"
        f"served.add(served.read('a', {str(adapters['four'])!r}))\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\nprint(served.names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "['a']\n", done.stderr
