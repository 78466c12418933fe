"""gpt-oss: files in the published layout, MXFP4 and bfloat16, and the parts that no other family has."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm, GptOssRotaryEmbedding, GptOssTopKRouter

from openbook.checkpoint.folder import load_model, save_model
from openbook.checkpoint.memory import plan_memory
from openbook.checkpoint.safetensors_io import load_tensors, save_tensors
from openbook.core.errors import UserError
from openbook.engine.model import Model
from openbook.models.base import trained_positions
from openbook.models.configs.gpt_oss import GptOssConfig
from openbook.models.context import CachedContext, DenseContext, PackedContext
from openbook.models.gpt_oss import TopKRouter
from openbook.models.layers.norm import WideRMSNorm
from openbook.models.layers.packed import Mxfp4Matrices
from openbook.models.layers.rope import attention_factor, scale_frequencies
from openbook.models.registry import config_from_hf, config_to_hf
from openbook.ops.base import AttentionMask
from openbook.ops.torch_ops import TorchOps
from openbook.tokenizer.chat import Chat, default_template
from openbook.tokenizer.tokenizer import Tokenizer

OPS = TorchOps()
D, F, E, N, K, H, V, LAYERS = 64, 32, 4, 4, 2, 8, 274, 2

# Every key of config.json of openai/gpt-oss-20b, with small sizes.
PUBLISHED: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 2,
    "head_dim": H,
    "hidden_act": "silu",
    "hidden_size": D,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": F,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": N,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": K,
    "num_local_experts": E,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 4,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": V,
}
PLAIN = {key: value for key, value in PUBLISHED.items() if key != "quantization_config"}


def published_tensors() -> dict[str, Tensor]:
    """Names, shapes and dtypes as in the published files."""
    generator = torch.Generator().manual_seed(0)

    def plain(*shape: int, around: float = 0.0, deviation: float = 0.1) -> Tensor:
        return (around + deviation * torch.randn(shape, generator=generator)).to(torch.bfloat16)

    tensors = {
        "model.embed_tokens.weight": plain(V, D, deviation=1.0),
        "model.norm.weight": plain(D, around=1.0),
        "lm_head.weight": plain(V, D),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = plain(D, around=1.0)
        for name, rows, columns in (("q", N * H, D), ("k", K * H, D), ("v", K * H, D), ("o", D, N * H)):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = plain(rows, columns)
            tensors[f"{prefix}self_attn.{name}_proj.bias"] = plain(rows)
        tensors[f"{prefix}self_attn.sinks"] = plain(N, deviation=1.0)
        tensors[f"{prefix}mlp.router.weight"] = plain(E, D)
        tensors[f"{prefix}mlp.router.bias"] = plain(E)
        for name, rows, columns in (("gate_up_proj", 2 * F, D), ("down_proj", D, F)):
            shape, expert = (E, rows, columns // 32), f"{prefix}mlp.experts.{name}"
            blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            tensors[f"{expert}_blocks"] = blocks
            tensors[f"{expert}_scales"] = torch.randint(119, 124, shape, generator=generator, dtype=torch.uint8)
            tensors[f"{expert}_bias"] = plain(E, rows)
    return tensors


def expanded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same model with plain experts, [experts, in, out], by Transformers."""
    plain = {name: tensor for name, tensor in tensors.items() if tensor.dtype != torch.uint8}
    for name in (name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")):
        plain[name] = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
    return plain


def write(folder: Path, values: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return write(tmp_path / "packed", PUBLISHED, published_tensors())


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write(tmp_path / "plain", PLAIN, expanded(published_tensors()))


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def test_published_files_give_the_logits_of_transformers(packed: Path, plain: Path) -> None:
    for_theirs = {**PLAIN, "pad_token_id": 0, "eos_token_id": 1}  # of this vocabulary
    (plain / "config.json").write_text(json.dumps(for_theirs))
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    expected = reference(ids(2, 9)).logits
    assert expected.std() > 0.3
    for folder in (packed, plain):
        logits = load_model(folder, OPS)(ids(2, 9), DenseContext(2, 9))
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_and_expanded_models_agree_to_the_bit(dtype: torch.dtype, packed: Path, plain: Path) -> None:
    models = [load_model(folder, OPS, dtype=dtype) for folder in (packed, plain)]
    assert all(parameter.dtype == dtype for model in models for parameter in model.parameters())
    with torch.inference_mode():
        logits = [model(ids(2, 9), DenseContext(2, 9)) for model in models]
        contexts = [CachedContext(model.config, 2, 12, dtype) for model in models]
        for step in (5, 1, 1):
            for context in contexts:
                context.append([step] * 2)
            steps = [model(ids(2, step), context) for model, context in zip(models, contexts, strict=True)]
            assert torch.equal(*steps)
    assert logits[0].dtype == dtype and torch.equal(*logits)


def test_a_packed_model_is_saved_with_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    model = load_model(packed, OPS, dtype=torch.bfloat16)
    save_model(model, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert written["quantization_config"] == PUBLISHED["quantization_config"]
    assert config_from_hf(written, "it") == model.config
    # In another dtype the rest is converted; what is packed stays.
    save_model(load_model(packed, OPS), tmp_path / "wide")
    wide = load_tensors(tmp_path / "wide/model.safetensors")
    for name, tensor in published_tensors().items():
        assert torch.equal(wide[name], tensor if tensor.dtype == torch.uint8 else tensor.float())


def test_memory(packed: Path, plain: Path) -> None:
    """Experts take 17 bytes for 32 weights; the plan made from the headers is what there is."""
    model = load_model(packed, OPS, dtype=torch.bfloat16)
    state = model.state_dict()
    num_weights = LAYERS * E * (2 * F * D + D * F)
    assert sum(tensor.nbytes for tensor in state.values() if tensor.dtype == torch.uint8) == num_weights * 17 // 32
    held = sum(tensor.nbytes for tensor in state.values())
    assert held == plan_memory(packed, model.config, dtype="bfloat16").weight_bytes
    unpacked = load_model(plain, OPS, dtype=torch.bfloat16)
    dense = sum(tensor.nbytes for tensor in unpacked.state_dict().values())
    assert dense - held == num_weights * 2 - num_weights * 17 // 32


def test_a_token_expands_its_experts_only(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(packed, OPS)
    asked: list[int] = []
    expand = Mxfp4Matrices.expand

    def counted(self: Mxfp4Matrices, index: int, rows: slice, dtype: torch.dtype) -> Tensor:
        asked.append(index)
        return expand(self, index, rows, dtype)

    monkeypatch.setattr(Mxfp4Matrices, "expand", counted)
    context = CachedContext(model.config, 1, 8)
    context.append([1])
    with torch.inference_mode():
        model(ids(1, 1), context)
    assert len(asked) == LAYERS * 2 * 2  # layers, chosen experts, matrices


def test_gradients_beside_packed_experts(packed: Path, plain: Path) -> None:
    models = [load_model(folder, OPS) for folder in (packed, plain)]
    for model in models:
        model.loss(ids(2, 9), ids(2, 9, seed=1), DenseContext(2, 9)).backward()
    expected = {name: parameter.grad for name, parameter in models[1].named_parameters()}
    ours = {name: parameter.grad for name, parameter in models[0].named_parameters()}
    assert expected.keys() - ours.keys() == {
        f"model.layers.{layer}.mlp.experts.{name}" for layer in range(LAYERS) for name in ("gate_up_proj", "down_proj")
    }
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def test_a_bfloat16_model_trains(plain: Path) -> None:
    model = load_model(plain, OPS, dtype=torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model.loss(ids(4, 9), ids(4, 9, seed=1), DenseContext(4, 9)) / 36
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def test_compiled_training_traces_one_graph(plain: Path) -> None:
    model = load_model(plain, OPS)
    documents = torch.tensor([[0] * 6 + [1] * 5 + [-1], [0] * 12])
    positions = torch.cat([torch.arange(6), torch.arange(5), torch.arange(1), torch.arange(12)]).view(2, 12)
    targets = ids(2, 12, seed=1).where(documents >= 0, -1)
    context = PackedContext(positions, documents)
    model.loss(ids(2, 12), targets, context).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    def loss_sum(ids: Tensor, targets: Tensor, trained: Tensor) -> Tensor:
        return model.loss(ids, targets, context, trained)

    trained = trained_positions(targets)
    torch._dynamo.mark_dynamic(trained, 0)
    compiled = torch.compile(loss_sum, fullgraph=True, backend="aot_eager")
    compiled(ids(2, 12), targets, trained).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-4)
    # Another routing and another number of trained tokens run through the same graph.
    targets[:, :4] = -1
    with torch.compiler.set_stance("fail_on_recompile"):
        loss = compiled(ids(2, 12, seed=2), targets, trained_positions(targets))
    torch.testing.assert_close(loss, model.loss(ids(2, 12, seed=2), targets, context))


def test_any_of_several_end_tokens_ends_an_answer(packed: Path, tiny_tokenizer: Tokenizer) -> None:
    assert tiny_tokenizer.vocab_size == V
    Chat(tiny_tokenizer, default_template()).save(packed)

    def answer(*ends: int) -> list[int]:
        (packed / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ends)}))
        return list(Model.load(packed).chat("Hi", max_tokens=12, temperature=0.0).token_ids)

    free = answer()
    places = {token: free.index(token) for token in free}
    first, second = sorted(places, key=lambda token: places[token])[1:3]
    assert answer(second) == free[: places[second] + 1]
    assert answer(second, first) == answer(first) == free[: places[first] + 1]


@pytest.mark.parametrize("layer_types", [["sliding_attention"] * 2, ["sliding_attention", "full_attention"]])
def test_the_window_caps_the_cache(layer_types: list[str], plain: Path) -> None:
    values = {**PLAIN, "layer_types": layer_types}
    (plain / "config.json").write_text(json.dumps(values))
    model = load_model(plain, OPS)
    context = CachedContext(model.config, 1, 64)
    sizes = []
    with torch.inference_mode():
        for step in (6, *[1] * 40):
            context.append([step])
            model(ids(1, step), context)
            sizes.append(context.num_bytes)
    # Four tokens and the slot for padding, keys and values.
    windowed = (4 + 1) * K * 2 * H * 4
    if "full_attention" not in layer_types:
        assert set(sizes) == {2 * windowed}
    else:
        assert sizes[-1] >= windowed + (46 + 1) * K * 2 * H * 4
        assert sizes[-1] <= windowed + (64 + 1) * K * 2 * H * 4


def test_sinks_against_a_slow_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    B, T, window, scale = 2, 7, 3, 0.4
    q, k, v = (torch.randn(B, T, heads, 5, generator=generator) for heads in (N, K, K))
    sinks = torch.randn(N, generator=generator)
    positions = torch.arange(T).expand(B, T)
    result = OPS.attention(q, k, v, AttentionMask(positions, positions, window=window), scale, sinks)
    for b in range(B):
        for t in range(T):
            for head in range(N):
                seen = range(max(0, t - window + 1), t + 1)
                group = head // (N // K)
                scores = [scale * (q[b, t, head] @ k[b, s, group]).item() for s in seen]
                total = sum(math.exp(score) for score in scores) + math.exp(sinks[head].item())
                expected = sum(math.exp(score) / total * v[b, s, group] for score, s in zip(scores, seen, strict=True))
                torch.testing.assert_close(result[b, t, head], expected, atol=1e-6, rtol=1e-5)


def test_clamped_swiglu_against_the_formula() -> None:
    x = torch.tensor([[-9.0, 9.0, 8.0, -8.0, 3.0, 0.5, 7.5, 7.5], [0.0, -1.0, 1.0, 0.0, -2.0, -7.0, 6.9, 0.1]])
    result = OPS.clamped_swiglu(x, 1.702, 7.0)
    for row, values in zip(result.tolist(), x.tolist(), strict=True):
        for got, gate, up in zip(row, values[::2], values[1::2], strict=True):
            g, u = min(gate, 7.0), max(-7.0, min(up, 7.0))
            assert got == pytest.approx(g / (1 + math.exp(-1.702 * g)) * (u + 1), rel=1e-6)


@pytest.mark.parametrize("is_training", [False, True])
def test_norm_multiplies_before_it_rounds(is_training: bool, packed: Path) -> None:
    """bfloat16 as in the reference, which keeps the norm's weight in float32. Other norms round in between."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((50, D), (D,)))
    reference, ours = GptOssRMSNorm(D, 1e-5), WideRMSNorm(D, 1e-5, OPS)
    reference.weight, ours.weight = nn.Parameter(weight.float()), nn.Parameter(weight)
    with torch.set_grad_enabled(is_training):
        result = ours(x.requires_grad_(is_training))
        expected = reference(x)
    assert result.dtype == torch.bfloat16
    if is_training:
        # Another order of the same products, which rounding to bfloat16 shows at times.
        torch.testing.assert_close(result, expected, atol=0, rtol=2**-7)
        assert (result != expected).float().mean() < 0.01
    else:
        assert torch.equal(result, expected)
    norms = [module for name, module in load_model(packed, OPS).named_modules() if name.endswith("norm")]
    assert len(norms) == 2 * LAYERS + 1 and all(isinstance(norm, WideRMSNorm) for norm in norms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(6, 3), (32, 4), (128, 4)])
def test_ties_choose_the_experts_of_the_reference(dtype: torch.dtype, num_experts: int, num_chosen: int) -> None:
    config = transformers.GptOssConfig(
        hidden_size=16, num_local_experts=num_experts, num_experts_per_tok=num_chosen, num_hidden_layers=1
    )
    reference, router = GptOssTopKRouter(config), TopKRouter(16, num_experts, num_chosen, OPS)
    generator = torch.Generator().manual_seed(0)
    # Three kinds of experts only; small integers, whose products are exact.
    kinds = torch.randint(-2, 3, (3, 16), generator=generator).repeat(num_experts // 3 + 1, 1)[:num_experts]
    bias = torch.randint(-1, 2, (3,), generator=generator).repeat(num_experts // 3 + 1)[:num_experts]
    for module in (reference, router):
        module.weight, module.bias = nn.Parameter(kinds.to(dtype)), nn.Parameter(bias.to(dtype))
    x = torch.cat([torch.randint(-2, 3, (20, 16), generator=generator), torch.zeros(2, 16)]).to(dtype)
    _, expected_weights, expected = reference(x)
    chosen, weights = router(x)
    scores = OPS.linear(x, router.weight, router.bias)
    last = scores.gather(1, chosen[:, -1:])
    # The last one chosen has equals that are not.
    assert ((scores >= last).sum(1) > num_chosen).all()
    assert torch.equal(chosen, expected)
    assert torch.equal(weights, expected_weights)


def test_frequencies_of_the_published_sizes() -> None:
    reference = GptOssRotaryEmbedding(transformers.GptOssConfig())
    scaling = config_from_hf({**PUBLISHED, "head_dim": 64}, "it").rope_scaling
    frequencies, factor = scale_frequencies(1 / 150000.0 ** (torch.arange(0, 64, 2) / 64), 150000.0, scaling)
    torch.testing.assert_close(frequencies, reference.inv_freq, rtol=1e-6, atol=0)
    assert factor == attention_factor(scaling) == pytest.approx(reference.attention_scaling)


def test_config_goes_both_ways() -> None:
    config = config_from_hf(PUBLISHED, "config.json")
    assert isinstance(config, GptOssConfig)
    assert config.expert_format == "mxfp4" and config.num_experts_per_tok == 2
    assert [config.window(layer) for layer in range(LAYERS)] == [4, None]
    assert config_from_hf(config_to_hf(config), "config.json") == config
    plain = config_from_hf(PLAIN, "config.json")
    assert plain.expert_format is None and "quantization_config" not in config_to_hf(plain)


def test_what_config_json_leaves_out_is_as_in_transformers() -> None:
    left_out = ("rope_scaling", "rope_theta", "layer_types", "sliding_window", "head_dim", "rms_norm_eps")
    values = {key: value for key, value in PLAIN.items() if key not in (*left_out, "num_experts_per_tok")}
    config = config_from_hf(values, "config.json")
    reference = transformers.GptOssConfig(num_hidden_layers=2)
    assert config.rope_scaling == config_from_hf(PUBLISHED, "it").rope_scaling
    assert config.rope_theta == reference.rope_parameters["rope_theta"] == 150000.0
    assert list(config.layer_types or ()) == reference.layer_types
    assert (config.sliding_window, config.head_dim, config.rms_norm_eps) == (128, 64, 1e-5)
    assert config.num_experts_per_tok == 2  # said as experts_per_token
    # Frequencies that are not stretched can be said too.
    plain = config_from_hf({**PLAIN, "rope_scaling": {"rope_type": "default"}}, "config.json")
    assert plain.rope_scaling is None and config_from_hf(config_to_hf(plain), "config.json") == plain


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quant_method is 'fp8', only 'mxfp4' is implemented: use an",
        ),
        ({"quantization_config": "mxfp4x"}, "quant_method is 'mxfp4x', only 'mxfp4' is implemented: use another model"),
        ({"experts_per_token": 3}, "experts_per_token is 3 but num_experts_per_tok is 2: correct one of them"),
        ({"attention_bias": False}, "attention_bias is False, only True is implemented: use another model"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu' is implemented: use another model"),
        ({"num_experts_per_tok": 5, "experts_per_token": 5}, "num_experts_per_tok is 5, there are 4 num_local_experts"),
        ({"intermediate_size": 40}, "intermediate_size is 40, experts in MXFP4 need a multiple of 32: correct it or"),
        ({"swiglu_limit": 0.0}, "swiglu_limit is 0.0, expected more than 0"),
        ({"sliding_window": None}, "layer_types names sliding_attention but sliding_window is missing: add it"),
        ({"moe_router": 1}, "unknown key 'moe_router'"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from_hf({**PUBLISHED, **fields}, "config.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.json: ") and "\n" not in str(caught.value)


BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"
MISMATCH = "weights and config.json do not belong together, fetch both again"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(BLOCKS), f"lacks tensors {BLOCKS}: {MISMATCH}"),
        (
            lambda tensors: tensors.update(expanded(tensors)),
            "has unknown tensors model.layers.0.mlp.experts.down_proj, ",
        ),
        (
            lambda tensors: tensors.update({BLOCKS: tensors[BLOCKS][:, :, :, :8]}),
            "model.layers.1.mlp.experts.down_proj.blocks has shape [4, 64, 1, 8], config.json says [4, 64, 1, 16]: ",
        ),
        (
            lambda tensors: tensors.update({BLOCKS: tensors[BLOCKS].float()}),
            f"model.layers.1.mlp.experts.down_proj.blocks holds float32, expected uint8: {MISMATCH}",
        ),
        (
            lambda tensors: tensors.update({BLOCKS: tensors[BLOCKS].view(torch.int8)}),
            f"model.layers.1.mlp.experts.down_proj.blocks holds int8, expected uint8: {MISMATCH}",
        ),
    ],
)
def test_damaged_packed_files(change: Any, message: str, tmp_path: Path) -> None:
    tensors = published_tensors()
    change(tensors)
    with pytest.raises(UserError) as caught:
        load_model(write(tmp_path / "damaged", PUBLISHED, tensors), OPS)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_plain_experts_of_a_wrong_form(tmp_path: Path) -> None:
    tensors = expanded(published_tensors())
    name = "model.layers.0.mlp.experts.gate_up_proj"
    down = name.replace("gate_up", "down")
    for changed, wrong, message in (
        (down, tensors[down].mT, f"{down} has shape [4, 32, 64], config.json says [4, 64, 32]: {MISMATCH}"),
        (name, tensors[name].flatten(), f"{name} and its like have shapes [16384], which do not fit together"),
    ):
        with pytest.raises(UserError) as caught:
            load_model(write(tmp_path / "wrong", PLAIN, {**tensors, changed: wrong}), OPS)
        assert message in str(caught.value)
