"""Adapters in torch: each row of a forward gets its own, as if it were merged into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openbook.checkpoint.folder import load_model, save_model
from openbook.checkpoint.lora import read_adapter
from openbook.core.errors import UserError
from openbook.models.adapter import Adapter
from openbook.models.base import CausalModel, init_weights
from openbook.models.config import DecoderConfig, ModelConfig
from openbook.models.configs.deepseek import DeepseekV2Config, DeepseekV3Config
from openbook.models.configs.gpt2 import GPT2Config
from openbook.models.configs.gpt_oss import GptOssConfig
from openbook.models.configs.qwen_moe import Qwen2MoeConfig, Qwen3MoeConfig
from openbook.models.context import CachedContext, DenseContext
from openbook.models.layers.lora import ModelAdapters
from openbook.models.registry import build_model
from openbook.ops.base import Ops
from openbook.ops.exact_ops import ExactOps
from openbook.ops.torch_ops import TorchOps
from peft_folders import merge, save_adapter

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
MOE = {**SIZES, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "tie_word_embeddings": False}
DEEPSEEK = {
    **MOE,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
CONFIGS: dict[str, ModelConfig] = {
    "llama": DecoderConfig(model_type="llama", **SIZES),
    "mistral": DecoderConfig(model_type="mistral", sliding_window=5, **SIZES),
    "qwen2": DecoderConfig(model_type="qwen2", **SIZES),
    "qwen3": DecoderConfig(model_type="qwen3", tie_word_embeddings=False, **SIZES),
    "gpt2": GPT2Config(**{**SIZES, "num_key_value_heads": 4}),
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=5),
    "qwen2_moe": Qwen2MoeConfig(**MOE, num_experts=4, shared_expert_intermediate_size=40, mlp_only_layers=(0,)),
    "qwen3_moe": Qwen3MoeConfig(**MOE, num_experts=4, decoder_sparse_step=2),
    "deepseek_v2": DeepseekV2Config(**DEEPSEEK),
    "deepseek_v3": DeepseekV3Config(**DEEPSEEK, q_lora_rank=20),
}
RANKS = {"one": 1, "four": 4, "eight": 8}


def make_folder(config: ModelConfig, folder: Path) -> Path:
    model = build_model(config, TorchOps())
    init_weights(model, 5)
    save_model(model, folder)
    return folder


def save_adapters(model: Path, folder: Path) -> dict[str, Path]:
    return {name: save_adapter(folder / name, model, rank=rank, seed=rank) for name, rank in RANKS.items()}


def load(folder: Path, adapters: dict[str, Path], ops: Ops | None = None) -> tuple[CausalModel, ModelAdapters]:
    model = load_model(folder, ops or TorchOps()).eval()
    loaded = ModelAdapters(model)
    for name, path in adapters.items():
        loaded.add(read_adapter(path, model.config, name))
    return model, loaded


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def logits(
    model: CausalModel, adapters: ModelAdapters, names: Sequence[str | None], ids: Tensor, wanted: Tensor | None = None
) -> Tensor:
    """Of whole rows, each with an adapter."""
    num_rows, num_tokens = ids.shape
    sequences = torch.arange(num_rows).repeat_interleave(num_tokens).tolist()
    with adapters.placed(names, sequences, None if wanted is None else wanted.tolist()):
        return model.project(model.hidden_states(ids, DenseContext(num_rows, num_tokens), wanted))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_is_as_if_its_adapter_were_merged(name: str, tmp_path: Path) -> None:
    folder = make_folder(CONFIGS[name], tmp_path / "model")
    paths = save_adapters(folder, tmp_path / "adapters")
    model, adapters = load(folder, paths)
    ids = tokens(5, 12)
    found = logits(model, adapters, ["four", None, "one", "eight", "four"], ids)
    expected = {None: load_model(folder, TorchOps())}
    expected |= {
        one: load_model(merge(folder, path, tmp_path / "merged" / one), TorchOps()) for one, path in paths.items()
    }
    with torch.inference_mode():
        for row, one in enumerate(["four", None, "one", "eight", "four"]):
            alone = expected[one](ids[row : row + 1], DenseContext(1, 12))
            torch.testing.assert_close(found[row : row + 1], alone, atol=1e-5, rtol=0)
            if one is not None:
                assert (found[row] - expected[None](ids[row : row + 1], DenseContext(1, 12))).abs().max() > 0.01


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A model, and adapters for it."""
    folder = tmp_path_factory.mktemp("lora")
    model = make_folder(CONFIGS["qwen3"], folder / "model")
    return model, save_adapters(model, folder / "adapters")


@pytest.fixture(params=[TorchOps, ExactOps], ids=["torch", "exact"])
def setting(request: pytest.FixtureRequest, folders: tuple[Path, dict[str, Path]]) -> tuple[CausalModel, ModelAdapters]:
    return load(*folders, request.param())


def test_wanted_rows_have_their_adapters_too(setting: tuple[CausalModel, ModelAdapters]) -> None:
    model, adapters = setting
    ids, names = tokens(4, 9), ["one", "eight", None, "one"]
    whole = logits(model, adapters, names, ids)
    wanted = torch.tensor([3, 8, 17, 20, 26, 27, 35])
    some = logits(model, adapters, names, ids, wanted)
    expected = whole.flatten(0, 1)[wanted]
    if model.ops.is_exact:
        assert torch.equal(some, expected)
    torch.testing.assert_close(some, expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_tokens_one_by_one(setting: tuple[CausalModel, ModelAdapters]) -> None:
    model, adapters = setting
    ids, names = tokens(3, 10), [None, "four", "one"]
    context = CachedContext(model.config, 3, 10)
    steps = []
    for start, end in ((0, 6), (6, 7), (7, 10)):
        context.append([end - start] * 3)
        sequences = torch.arange(3).repeat_interleave(end - start).tolist()
        with adapters.placed(names, sequences):
            steps.append(model(ids[:, start:end], context))
    expected = logits(model, adapters, names, ids)
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-5, rtol=0)


def test_company_changes_no_bit(folders: tuple[Path, dict[str, Path]]) -> None:
    model, adapters = load(*folders, ExactOps())
    ids, names = tokens(5, 12), ["four", None, "one", "eight", "four"]
    together = logits(model, adapters, names, ids)
    for row, name in enumerate(names):
        assert torch.equal(together[row], logits(model, adapters, [name], ids[row : row + 1])[0])


def test_adapters_come_and_go(folders: tuple[Path, dict[str, Path]]) -> None:
    folder, paths = folders
    model, adapters = load(folder, paths)
    assert adapters.names == ("one", "four", "eight")
    ids, plain = tokens(1, 8), load_model(folder, TorchOps())
    before = logits(model, adapters, ["eight"], ids)
    assert torch.equal(logits(model, adapters, [None], ids), logits(plain, ModelAdapters(plain), [None], ids))
    adapters.remove("four")
    assert torch.equal(before, logits(model, adapters, ["eight"], ids))
    adapters.remove("eight")
    adapters.remove("one")
    assert adapters.names == () and all(getattr(module, "low_rank", None) is None for module in model.modules())
    adapters.add(read_adapter(paths["one"], model.config, "eight"))
    assert (before - logits(model, adapters, ["eight"], ids)).abs().max() > 0.01


def test_an_adapter_in_half_precision(tmp_path: Path) -> None:
    folder = make_folder(CONFIGS["llama"], tmp_path / "model")
    adapter = save_adapter(tmp_path / "adapter", folder)
    model = load_model(folder, TorchOps(), dtype=torch.bfloat16).eval()
    adapters = ModelAdapters(model)
    adapters.add(read_adapter(adapter, model.config))
    merged = load_model(merge(folder, adapter, tmp_path / "merged"), TorchOps())
    ids = tokens(2, 9)
    found = logits(model, adapters, ["adapter", "adapter"], ids)
    assert found.dtype == torch.bfloat16
    with torch.inference_mode():
        torch.testing.assert_close(found.float(), merged(ids, DenseContext(2, 9)), atol=0.2, rtol=0)


def test_what_is_refused(tmp_path: Path) -> None:
    folder = make_folder(CONFIGS["llama"], tmp_path / "model")
    paths = save_adapters(folder, tmp_path / "adapters")
    model, adapters = load(folder, paths)

    def refusal(act: Any) -> str:
        with pytest.raises(UserError) as error:
            act()
        return str(error.value)

    again = read_adapter(paths["one"], model.config)
    assert refusal(lambda: adapters.add(again)) == (
        "an adapter one is loaded already: unload it first, or give another name"
    )
    assert refusal(lambda: adapters.remove("ome")) == (
        "unknown adapter 'ome': did you mean 'one'? loaded are one, four, eight; load it first"
    )
    assert refusal(lambda: logits(model, adapters, ["two"], tokens(1, 3))).startswith("unknown adapter 'two'")
    small = build_model(DecoderConfig(model_type="llama", **{**SIZES, "intermediate_size": 48}), TorchOps())
    renamed = Adapter("another", again.digest, again.matrices)
    assert refusal(lambda: ModelAdapters(small).add(renamed)) == (
        "the adapter another updates model.layers.0.mlp.down_proj, which this model has not in that shape: read it for "
        "this model"
    )
    gpt2 = build_model(CONFIGS["gpt2"], TorchOps())
    assert "updates model.layers.0.mlp.gate_up_proj, which" in refusal(
        lambda: ModelAdapters(gpt2).add(
            Adapter("x", "", {name: one for name, one in again.matrices.items() if "gate_up" in name})
        )
    )
    assert all(getattr(module, "low_rank", None) is None for one in (small, gpt2) for module in one.modules())
    with adapters.placed(["one"], [0, 0]), pytest.raises(ValueError, match=r"a product of 3 rows.*placed for \[2\]"):
        model(tokens(1, 3), DenseContext(1, 3))
    with torch.inference_mode():
        model(tokens(1, 3), DenseContext(1, 3))  # what was placed is placed no more
