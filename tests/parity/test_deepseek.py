"""DeepSeek V2 and V3 against Transformers' classes: latent attention, routing, ties."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from checks import GRADIENTS, LOGITS, ParityChecks, as_in_a_file, load_theirs, make_ours, tokens
from torch import Tensor

from openbook.checkpoint.folder import load_model, save_model
from openbook.core.errors import UserError
from openbook.models.base import CausalModel
from openbook.models.config import RopeScaling
from openbook.models.configs.deepseek import DeepseekV2Config, DeepseekV3Config
from openbook.models.context import CachedContext, DenseContext
from openbook.models.layers.mla import LatentAttention
from openbook.models.registry import config_from_hf, config_to_hf
from openbook.ops.torch_ops import TorchOps

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
YARN = RopeScaling(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.1, beta_fast=16.0
)


def v2(**fields: Any) -> DeepseekV2Config:
    return DeepseekV2Config(**{**SIZES, **fields})


def v3(**fields: Any) -> DeepseekV3Config:
    groups = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    return DeepseekV3Config(**{**SIZES, **groups, **fields})


class DeepseekChecks(ParityChecks):
    def reference_gradients(self, model: CausalModel, reference: Any) -> dict[str, Tensor]:
        """Transformers stacks the experts in memory; the table tells them apart as in a file.

        No gradient moves the router's bias: a buffer there as here.
        """
        biases = {n: torch.zeros_like(b) for n, b in reference.named_buffers() if n.endswith("correction_bias")}
        stacked = {**super().reference_gradients(model, reference), **biases}
        return as_in_a_file(stacked, model.config)


class TestDeepseekV2(DeepseekChecks):
    CONFIGS: ClassVar = {
        "greedy": v2(),
        "lite": v2(q_lora_rank=None, first_k_dense_replace=0, routed_scaling_factor=1.5),
        "groups": v2(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0),
        "yarn": v2(rope_scaling=YARN),
        "dense": v2(first_k_dense_replace=3),
    }


class TestDeepseekV3(DeepseekChecks):
    CONFIGS: ClassVar = {
        "groups": v3(),
        "one-group": v3(n_group=1, topk_group=1, num_experts_per_tok=2),
        "unnormalised": v3(norm_topk_prob=False),
        "yarn": v3(rope_scaling=YARN),
        "halves": v3(rope_interleave=False, q_lora_rank=None),
    }


def test_both_forms_of_attention_agree() -> None:
    model = make_ours(v3())
    ids, targets = tokens(model.config, 2, 9), tokens(model.config, 2, 9, seed=1)
    logits, gradients = [], []
    for most_absorbed in (3, 99):
        for layer in model.modules():
            if isinstance(layer, LatentAttention):
                layer.most_absorbed = most_absorbed
        model.zero_grad()
        logits.append(model(ids, DenseContext(2, 9)))
        model.loss(ids, targets, DenseContext(2, 9)).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(logits[0], logits[1], **LOGITS)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], **GRADIENTS)


def test_few_tokens_are_absorbed_and_many_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    config = v3()
    model = make_ours(config)
    forms: list[str] = []
    for form in ("_attend_absorbed", "_attend_expanded"):
        whole = getattr(LatentAttention, form)
        monkeypatch.setattr(
            LatentAttention, form, lambda *args, form=form, whole=whole: (forms.append(form), whole(*args))[1]
        )
    context = CachedContext(config, batch=1, capacity=20)
    for count in (9, 1, 3):
        context.append([count])
        model(tokens(config, 1, count), context)
    assert forms == ["_attend_expanded"] * 3 + ["_attend_absorbed"] * 6


def test_what_config_json_leaves_out_is_as_in_transformers() -> None:
    values = config_to_hf(v3(n_routed_experts=32, num_hidden_layers=4))
    for name in ("n_group", "topk_group", "first_k_dense_replace", "routed_scaling_factor", "q_lora_rank"):
        del values[name]
    reference = transformers.AutoConfig.for_model(**values)
    config = config_from_hf(values, "config.json")
    assert isinstance(config, DeepseekV3Config)
    assert config.q_lora_rank == reference.q_lora_rank == 1536
    assert config.groups == (reference.n_group, reference.topk_group) == (8, 4)
    assert config.first_k_dense_replace == reference.first_k_dense_replace
    assert config.routed_scaling_factor == reference.routed_scaling_factor
    # Lite says null, which stays null.
    assert config_from_hf({**values, "q_lora_rank": None}, "config.json").q_lora_rank is None  # type: ignore[attr-defined]


def test_the_cache_keeps_the_latent_alone() -> None:
    config = v3()
    context = CachedContext(config, batch=1, capacity=64)
    context.append([40])
    with torch.inference_mode():
        make_ours(config)(tokens(config, 1, 40), context)
    # Room grows by half of what is needed; one slot more takes padding.
    assert context.num_bytes == 3 * (60 + 1) * (16 + 4) * 4


@pytest.mark.parametrize("config", [v2(topk_method="group_limited_greedy", n_group=4, topk_group=2), v3()])
def test_equal_scores_choose_the_experts_of_the_reference(config: Any, tmp_path: Path) -> None:
    model = make_ours(config)
    routers = [layer.mlp.gate for layer in model.model.layers[1:]]
    with torch.no_grad():
        for router in routers:
            router.weight[:] = router.weight[:1]  # all experts score alike, but for two
            router.weight[5] *= 1.5
            router.weight[2] *= 1.5
    save_model(model, tmp_path)
    reference = load_theirs(tmp_path)
    x = torch.randn(17, 32, generator=torch.Generator().manual_seed(1))
    for router, layer in zip(routers, reference.model.layers[1:], strict=True):
        chosen, weights = router(x)
        _, their_weights, theirs = layer.mlp.gate(x)
        assert torch.equal(chosen.sort().values, theirs.sort().values)
        torch.testing.assert_close(weights.sum(-1), their_weights.sum(-1))


def test_the_bias_stays_float32(tmp_path: Path) -> None:
    config = v3()
    model = make_ours(config)
    model.model.layers[1].mlp.gate.e_score_correction_bias.fill_(1.0 + 2.0**-12)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, TorchOps(), dtype=torch.bfloat16)
    gate = loaded.model.layers[1].mlp.gate
    assert gate.weight.dtype == torch.bfloat16
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert float(gate.e_score_correction_bias[0]) == 1.0 + 2.0**-12
    assert loaded(tokens(config, 1, 5), DenseContext(1, 5)).isfinite().all()


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("v2", {"norm_topk_prob": True}, "norm_topk_prob is True, only False is implemented"),
        ("v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("v2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid', only 'softmax' is implemented"),
        ("v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax', only 'sigmoid' is implemented"),
        ("v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2, only 1 is implemented"),
        ("v3", {"n_group": 3}, "n_group 3 and topk_group 2 do not fit 8 n_routed_experts"),
        ("v3", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, the chosen groups have 4 experts"),
        ("v3", {"head_dim": 7}, "head_dim is 7, expected qk_rope_head_dim, 4"),
        ("v3", {"kv_lora_rank": 0}, "kv_lora_rank is 0, expected more than 0"),
        ("v3", {"num_key_value_heads": 2}, "num_key_value_heads is 2, expected num_attention_heads, 4"),
        ("v3", {"sliding_window": 8}, "deepseek_v3 has no sliding window"),
        ("v3", {"n_group": 8, "topk_group": 4}, "8 n_routed_experts in n_group 8 are fewer than two a group"),
        ("v3", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1, expected 0 or more"),
    ],
)
def test_refusals(model_type: str, fields: dict[str, Any], message: str) -> None:
    values = {**config_to_hf(v2() if model_type == "v2" else v3()), **fields}
    with pytest.raises(UserError) as caught:
        config_from_hf(values, "config.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)
