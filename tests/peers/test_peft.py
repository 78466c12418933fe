"""Adapters that the library PEFT saves give PEFT's logits here, in torch and in the native decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import LOGITS, SIZES, load_theirs, make_ours
from torch import Tensor

from openbook.checkpoint.folder import load_model, save_model
from openbook.checkpoint.lora import read_adapter
from openbook.checkpoint.model_source import open_model
from openbook.engine.native_adapters import NativeAdapters
from openbook.engine.native_load import load_native
from openbook.engine.native_runner import allocate_cache
from openbook.models.config import DecoderConfig, ModelConfig
from openbook.models.configs.gpt2 import GPT2Config
from openbook.models.configs.qwen_moe import Qwen2MoeConfig
from openbook.models.context import DenseContext
from openbook.models.layers.lora import ModelAdapters
from openbook.ops.torch_ops import TorchOps
from peft_folders import save_adapter

# PEFT uses what Transformers is about to rename, and says that it changes a setting for GPT-2.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
CONFIGS: dict[str, ModelConfig] = {
    "llama": DecoderConfig(model_type="llama", **SIZES),
    "qwen3": DecoderConfig(model_type="qwen3", **SIZES),
    "gpt2": GPT2Config(**{**SIZES, "num_key_value_heads": 4}),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, **MOE, mlp_only_layers=(0,), tie_word_embeddings=False),
}
PATTERNS = {"rank_pattern": {"v_proj": 2, r"layers\.1\..*q_proj": 3}, "alpha_pattern": {"self_attn.q_proj": 5}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "all": ("qwen3", {"target_modules": "all-linear", "lora_alpha": 3}),
    "stabilised": ("llama", {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3}),
    "patterns": ("llama", {"target_modules": ["q_proj", "k_proj", "v_proj"], **PATTERNS}),
    "stabilised-patterns": ("qwen3", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, **PATTERNS}),
    "expression": ("llama", {"target_modules": r".*\.(o|down)_proj", "exclude_modules": r".*\.2\..*"}),
    "some-layers": ("llama", {"target_modules": ["up_proj", "k_proj"], "layers_to_transform": [0, 2]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "transposed-all": ("gpt2", {"target_modules": "all-linear", "use_rslora": True}),
    "shared-expert": ("qwen2_moe", {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}),
}


def logits_in_torch(folder: Path, adapter: Path, ids: Tensor) -> Tensor:
    model = load_model(folder, TorchOps()).eval()
    adapters = ModelAdapters(model)
    adapters.add(read_adapter(adapter, model.config, "it"))
    with torch.inference_mode(), adapters.placed(["it"], [0] * ids.shape[1]):
        return model(ids, DenseContext(1, ids.shape[1]))


def logits_in_native_code(folder: Path, adapter: Path, ids: Tensor) -> Tensor:
    source = open_model(folder)
    runner, num_tokens = load_native(source), ids.shape[1]
    adapters = NativeAdapters(runner.decoder)
    adapters.add(read_adapter(adapter, source.config, "it"))
    logits = np.empty((num_tokens, source.config.vocab_size), np.float32)
    places = np.arange(num_tokens, dtype=np.int32)
    tables = np.arange(2, dtype=np.int32)[None]
    runner.decoder.step(
        *(ids[0].numpy().astype(np.int32), places, np.zeros_like(places), tables),
        *(*allocate_cache(source.config, 2, "float32"), *runner.rope(32)),
        *(places, logits, adapters.of_sequences(["it"])),
    )
    return torch.from_numpy(logits)[None]


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    import peft

    family, settings = CASES[case]
    folder, saved = tmp_path / "model", tmp_path / "adapter"
    save_model(make_ours(CONFIGS[family]), folder)
    torch.manual_seed(1)
    # init_lora_weights=False: B is random too, as if it had been trained.
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **settings)
    theirs = peft.get_peft_model(load_theirs(folder), config).eval()
    theirs.save_pretrained(saved)
    ids = torch.randint(0, 61, (1, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(ids).logits
        with theirs.disable_adapter():
            assert (theirs(ids).logits - expected).abs().max() > 0.05
    torch.testing.assert_close(logits_in_torch(folder, saved, ids), expected, **LOGITS)
    if family != "qwen2_moe":
        torch.testing.assert_close(logits_in_native_code(folder, saved, ids), expected, **LOGITS)


def test_peft_reads_the_folders_that_other_tests_write(tmp_path: Path) -> None:
    import peft

    folder = tmp_path / "model"
    save_model(make_ours(CONFIGS["llama"]), folder)
    adapter = save_adapter(tmp_path / "adapter", folder)
    ids = torch.randint(0, 61, (1, 20), generator=torch.Generator().manual_seed(2))
    theirs = peft.PeftModel.from_pretrained(load_theirs(folder), adapter).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits_in_torch(folder, adapter, ids), theirs(ids).logits, **LOGITS)
