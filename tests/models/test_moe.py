"""Experts, routers, and configurations of mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2MoeConfig as TheirConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from openbook.checkpoint.folder import load_model, save_model
from openbook.checkpoint.safetensors_io import load_tensors, save_tensors
from openbook.core.errors import UserError
from openbook.models.base import CausalModel, init_weights, trained_positions
from openbook.models.configs.qwen_moe import Qwen2MoeConfig, Qwen3MoeConfig
from openbook.models.context import DenseContext, PackedContext
from openbook.models.layers.moe import Experts, SoftmaxRouter
from openbook.models.registry import build_model, config_from_hf, config_to_hf
from openbook.ops.torch_ops import TorchOps

OPS = TorchOps()
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "initializer_range": 0.2,
}
CONFIG = Qwen3MoeConfig(**SIZES)


def make_model(config: Qwen3MoeConfig = CONFIG) -> CausalModel:
    model = build_model(config, OPS)
    init_weights(model, 0)
    return model


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(experts: Experts) -> Experts:
    for seed, parameter in enumerate(experts.parameters()):
        parameter.data = rand(*parameter.shape, seed=seed + 10)
    return experts


def clamped(gate_up: Tensor) -> Tensor:
    """Some other activation, gate and up interleaved."""
    return gate_up[..., ::2].clamp(max=0.5) * (gate_up[..., 1::2] + 1)


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


@pytest.mark.parametrize(("activation", "has_bias"), [(None, False), (clamped, True)])
def test_experts_equal_a_sum_token_by_token(activation: Any, has_bias: bool) -> None:
    experts = filled(Experts(6, 8, 5, OPS, activation=activation, has_bias=has_bias))
    x, weights = rand(7, 8), rand(7, 3, seed=1)
    chosen = rand(7, 6, seed=2).topk(3).indices
    expected = torch.zeros(7, 8, dtype=torch.float64)
    inner = activation or silu_mul
    for token in range(7):
        for place in range(3):
            e = int(chosen[token, place])
            wide = experts.gate_up_proj[e] @ x[token]
            if has_bias:
                wide = wide + experts.gate_up_proj_bias[e]
            narrow = experts.down_proj[e] @ inner(wide)
            if has_bias:
                narrow = narrow + experts.down_proj_bias[e]
            expected[token] += weights[token, place] * narrow
    torch.testing.assert_close(experts(x, chosen, weights), expected)
    with torch.inference_mode():
        torch.testing.assert_close(experts(x, chosen, weights), expected)
        torch.testing.assert_close(experts(x[:1], chosen[:1], weights[:1]), expected[:1])


def test_only_chosen_experts_are_read() -> None:
    experts = filled(Experts(6, 8, 5, OPS))
    chosen = torch.tensor([[4, 1], [1, 4]])
    expected = experts(rand(2, 8), chosen, rand(2, 2))
    with torch.inference_mode():
        for parameter in experts.parameters():
            parameter[[0, 2, 3, 5]] = torch.nan
        torch.testing.assert_close(experts(rand(2, 8), chosen, rand(2, 2)), expected)


class Doubled(nn.Module):
    """Weights kept as halves."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("halves", weight / 2)

    def pieces(self, index: int, dtype: torch.dtype) -> Iterator[Tensor]:
        for rows in self.halves[index].to(dtype).split(3):
            yield rows * 2


def test_weights_may_stay_packed() -> None:
    plain = filled(Experts(6, 8, 5, OPS))

    class PackedExperts(Experts):
        def make_weights(self) -> None:
            self.gate_up_proj = Doubled(plain.gate_up_proj.detach())
            self.down_proj = Doubled(plain.down_proj.detach())

    packed = PackedExperts(6, 8, 5, OPS)
    assert list(packed.state_dict()) == ["gate_up_proj.halves", "down_proj.halves"]
    x, chosen, weights = rand(4, 8), rand(4, 6, seed=2).topk(2).indices, rand(4, 2, seed=1)
    torch.testing.assert_close(packed(x, chosen, weights), plain(x, chosen, weights))


THEIR_ROUTERS: list[type] = [Qwen2MoeTopKRouter, Qwen3MoeTopKRouter]


@pytest.mark.parametrize("theirs", THEIR_ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_renormalised", [False, True])
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(6, 2), (60, 4), (128, 8)])
def test_ties_choose_the_experts_of_the_reference(
    theirs: type, dtype: torch.dtype, is_renormalised: bool, num_experts: int, num_chosen: int
) -> None:
    config = TheirConfig(
        hidden_size=16,
        num_experts=num_experts,
        num_experts_per_tok=num_chosen,
        norm_topk_prob=is_renormalised,
    )
    reference = theirs(config)
    router = SoftmaxRouter(16, num_experts, num_chosen, OPS, is_renormalised=is_renormalised)
    # Three kinds of experts only, so that every choice is among equals; the last two tokens see all experts alike.
    # Small integers, whose products are exact: else equal rows may differ by rounding.
    weight = (2 * rand(3, 16)).round().repeat(num_experts // 3 + 1, 1)[:num_experts].to(dtype)
    for module in (reference, router):
        module.weight = nn.Parameter(weight.clone())
    x = torch.cat([rand(40, 16, seed=1).round(), torch.zeros(2, 16)]).to(dtype)
    _, expected_weights, expected = reference(x)
    chosen, weights = router(x)
    probabilities = OPS.softmax(OPS.linear(x, weight))
    kept = probabilities.gather(1, chosen)
    num_equal = (probabilities[:, :, None] == kept[:, None, -1:]).sum((1, 2))
    assert (num_equal > 1).all()
    assert torch.equal(chosen, expected)
    assert torch.equal(weights, expected_weights)
    assert weights.dtype == dtype
    if is_renormalised and dtype == torch.float32:
        torch.testing.assert_close(weights.sum(-1), torch.ones(42))


def batch() -> tuple[Tensor, Tensor, PackedContext]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 61, (2, 20), generator=generator)
    positions = torch.cat([torch.arange(12), torch.arange(8)]).expand(2, -1)
    documents = torch.tensor([0] * 12 + [1] * 8).expand(2, -1)
    targets = ids.roll(-1, 1)
    targets[positions < 5] = -100
    return ids, targets, PackedContext(positions, documents)


def test_compiled_training_traces_one_graph() -> None:
    model = make_model()
    ids, targets, context = batch()
    model.loss(ids, targets, context).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    def loss_sum(ids: Tensor, targets: Tensor, trained: Tensor) -> Tensor:
        return model.loss(ids, targets, context, trained)

    trained = trained_positions(targets)
    torch._dynamo.mark_dynamic(trained, 0)
    compiled = torch.compile(loss_sum, fullgraph=True, backend="aot_eager")
    compiled(ids, targets, trained).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-4)
    # Another routing and another number of trained tokens run through the same graph.
    targets[:, :10] = -1
    with torch.compiler.set_stance("fail_on_recompile"):
        loss = compiled(ids.flip(0), targets, trained_positions(targets))
    torch.testing.assert_close(loss, model.loss(ids.flip(0), targets, context))


def test_it_trains() -> None:
    model = make_model()
    ids, targets, context = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        loss = model.loss(ids, targets, context) / (targets >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_nothing_to_train_on() -> None:
    model = make_model()
    ids, _, context = batch()
    targets = torch.full_like(ids, -100)
    loss = model.loss(ids, targets, context, trained_positions(targets))
    loss.backward()
    assert loss.item() == 0.0
    assert all(parameter.grad is not None and (parameter.grad == 0).all() for parameter in model.parameters())


def test_one_expert_is_a_dense_layer() -> None:
    config = Qwen3MoeConfig(**{**SIZES, "num_experts": 1, "num_experts_per_tok": 1}, norm_topk_prob=True)
    mlp = make_model(config).model.layers[0].mlp
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    expected = OPS.silu_mul(x @ mlp.experts.gate_up_proj[0].T) @ mlp.experts.down_proj[0].T
    torch.testing.assert_close(mlp(x), expected)


def test_stacked_experts_in_files_are_read_too(tmp_path: Path) -> None:
    model = make_model()
    save_model(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_tensors(file)
    assert tensors["model.layers.1.mlp.experts.5.gate_proj.weight"].shape == (12, 16)
    tensors = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    tensors |= {name: tensor for name, tensor in model.state_dict().items() if ".experts." in name}
    save_tensors(file, tensors)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(load_model(tmp_path, OPS)(ids, DenseContext(1, 10)), model(ids, DenseContext(1, 10)))


def test_wrong_experts_are_named(tmp_path: Path) -> None:
    save_model(make_model(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_tensors(file)
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    save_tensors(file, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(UserError, match=f"lacks tensors {name}: weights and config.json do not belong together"):
        load_model(tmp_path, OPS)
    save_tensors(file, {**tensors, name: tensors[name][:, :5].contiguous()})
    with pytest.raises(UserError, match=r"do not fit together: weights and config.json do not belong together"):
        load_model(tmp_path, OPS)
    save_tensors(
        file, {key: value[:4].contiguous() if ".experts.5." in key else value for key, value in tensors.items()}
    )
    with pytest.raises(UserError, match=r"weights and config\.json do not belong together"):
        load_model(tmp_path, OPS)


def test_which_layers_have_experts() -> None:
    fields = {**SIZES, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": (3,)}
    config = Qwen3MoeConfig(**fields)
    assert [config.has_experts(layer) for layer in range(6)] == [False, True, False, False, False, True]
    names = build_model(config, OPS, "meta").state_dict().keys()
    assert {int(name.split(".")[2]) for name in names if ".experts." in name} == {1, 5}


# As published, less what says nothing about the shape.
QWEN3_30B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN2_57B: dict[str, Any] = {
    **{key: value for key, value in QWEN3_30B.items() if key not in ("head_dim", "attention_bias", "mlp_only_layers")},
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "moe_intermediate_size": 2560,
    "norm_topk_prob": False,
    "num_attention_heads": 28,
    "num_experts": 64,
    "num_hidden_layers": 28,
    "shared_expert_intermediate_size": 20480,
    "sliding_window": 65536,
}


def test_published_configurations() -> None:
    config = config_from_hf(QWEN3_30B, "config.json")
    assert isinstance(config, Qwen3MoeConfig)
    assert (config.num_experts, config.head_dim, config.norm_topk_prob) == (128, 128, True)
    assert config_from_hf(config_to_hf(config), "config.json") == config
    shared = config_from_hf(QWEN2_57B, "config.json")
    assert isinstance(shared, Qwen2MoeConfig)
    assert (shared.shared_expert_intermediate_size, shared.head_dim, shared.window(0)) == (20480, 128, None)
    assert config_from_hf(config_to_hf(shared), "config.json") == shared


def test_qwen3_coder_says_more() -> None:
    coder = {**QWEN3_30B, "use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}
    assert config_from_hf(coder, "config.json") == config_from_hf(QWEN3_30B, "config.json")
    with pytest.raises(UserError, match=r"^config\.json: shared_expert_intermediate_size is 64, only 0 is implemented"):
        config_from_hf({**coder, "shared_expert_intermediate_size": 64}, "config.json")


def test_transformers_new_name_for_the_number_of_experts() -> None:
    values = {key: value for key, value in QWEN3_30B.items() if key != "num_experts"}
    config = config_from_hf({**values, "num_local_experts": 128, "mlp_only_layers": None}, "config.json")
    assert config == config_from_hf(QWEN3_30B, "config.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_experts_per_tok": 7},
            r"^config.json: model: num_experts_per_tok is 7, there are 6 num_experts: change one of them$",
        ),
        ({"num_experts": 0}, r"^config.json: model: num_experts is 0, expected more than 0 and at most"),
        ({"decoder_sparse_step": 0}, r"^config.json: model: decoder_sparse_step is 0, expected more than 0"),
        (
            {"mlp_only_layers": [0, 2]},
            r"^config.json: model: mlp_only_layers names layer 2, expected 0 to 1: remove it$",
        ),
        ({"use_sliding_window": True}, r"^config.json: use_sliding_window is True, only False is implemented: use an"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"^config.json: layer_types is \['full_attention', 'sliding_attention'\], only 'full_attention' is impl",
        ),
        ({"layer_types": 5}, r"^config.json: layer_types is 5, only 'full_attention' is implemented"),
        ({"mlp_only_layers": "all"}, r"^config.json: .*mlp_only_layers"),
        ({"num_experts": "six"}, r"^config.json: .*num_experts"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config_from_hf({**config_to_hf(CONFIG), **fields}, "config.json")
    assert "\n" not in str(caught.value)


def test_a_window_that_would_not_be_saved_is_refused() -> None:
    with pytest.raises(UserError, match="qwen3_moe has no sliding window: remove sliding_window and layer_types"):
        Qwen3MoeConfig(**SIZES, sliding_window=4)
