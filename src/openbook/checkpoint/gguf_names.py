"""Tensor names in GGUF files and in Hugging Face checkpoints: one table per architecture.

Names: gguf-py/gguf/tensor_mapping.py in https://github.com/ggml-org/llama.cpp; what else changes between the two forms
(rows permuted, matrices transposed, experts stacked): `modify_tensors` in conversion/ there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Values = dict[str, Any]  # of a config.json, by key
# What reads is given tensors; where it only takes rows or transposes, it may be given a `RawMatrix` too.
Read = Callable[[Sequence[Any], Values], Any]
Write = Callable[["Tensor", Values], "Tensor"]


@dataclass(frozen=True)
class Rule:
    """A Hugging Face tensor and the GGUF tensors it is made of.

    `{layer}` stands for each layer's number; a `{expert}` in `hf` for each index of the first axis of the one GGUF
    tensor. read: makes the one of the others. write: the reverse, of one tensor. is_meant: whether the model's values
    call for it, where two rules have the same source. is_packed: `read` is given stored bytes, uint8 [..., blocks,
    bytes of a block], in place of weights.
    """

    hf: str
    gguf: tuple[str, ...]
    read: Read = lambda parts, values: parts[0]
    write: Write = lambda tensor, values: tensor
    is_meant: Callable[[Values], bool] = lambda values: True
    is_packed: bool = False


def rules_for(architecture: str, layers: Sequence[int]) -> Iterator[tuple[Rule, int]]:
    """The table of an architecture with layers spelled out: what has none, then layer by layer."""
    for rule in TABLES[architecture]:
        if "{layer}" not in rule.hf:
            yield rule, 0
    for layer in layers:
        for rule in TABLES[architecture]:
            if "{layer}" in rule.hf:
                yield rule, layer


def _plain(pairs: str, prefix: str = "") -> tuple[Rule, ...]:
    """Rules for "GGUF:HF" pairs of names that hold the same tensor."""
    layer, hf_layer = ("blk.{layer}.", f"{prefix}.{{layer}}.") if prefix else ("", "")
    return tuple(Rule(hf_layer + hf, (layer + gguf,)) for gguf, hf in (pair.split(":") for pair in pairs.split()))


def _paired(rows: Any, num_heads: int) -> Any:
    """Rows of each head from halves (x0..., y0...) to pairs (x0, y0, ...): rotary embedding as Meta published it."""
    return rows[np.arange(rows.shape[0]).reshape(num_heads, 2, -1).swapaxes(1, 2).flatten()]


def _halved(rows: Any, num_heads: int) -> Any:
    """The reverse of `_paired`."""
    return rows[np.arange(rows.shape[0]).reshape(num_heads, -1, 2).swapaxes(1, 2).flatten()]


def _rotary(part: str, kind: str, heads: str) -> Rule:
    return Rule(
        f"model.layers.{{layer}}.self_attn.{part}_proj.{kind}",
        (f"blk.{{layer}}.attn_{part}.{kind}",),
        read=lambda parts, values: _halved(parts[0], values[heads]),
        write=lambda tensor, values: _paired(tensor, values[heads]),
    )


def _transposed(gguf: str, hf: str) -> Rule:
    return Rule(
        f"transformer.h.{{layer}}.{hf}.weight",
        (f"blk.{{layer}}.{gguf}.weight",),
        read=lambda parts, values: parts[0].mT,
        write=lambda tensor, values: tensor.mT,
    )


def _join_latent(parts: Sequence[Tensor], values: Values) -> Tensor:
    """k_b [heads, latent, nope] and v_b [heads, v, latent] to kv_b [heads (nope + v), latent]."""
    import torch

    keys, value = parts
    return torch.cat((keys.transpose(1, 2), value), dim=1).flatten(0, 1)


def _interleaved(parts: Sequence[Tensor]) -> Tensor:
    """gate and up, [experts, rows, ...] each, to rows in turn, [experts, 2 rows, ...]; one part as it is."""
    import torch

    return torch.stack(tuple(parts), dim=2).flatten(1, 2) if len(parts) > 1 else parts[0]


def _mxfp4_codes(parts: Sequence[Tensor], values: Values) -> Tensor:
    """Blocks uint8 [experts, rows, blocks, 17] to codes [..., 16]: in each byte two neighbours, the first one low.

    In GGUF byte i of a block, after the scale, holds the weights i (low) and i + 16.
    """
    import torch

    packed = _interleaved(parts)[..., 1:]
    codes = torch.cat((packed & 15, packed >> 4), dim=-1)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _mxfp4_scales(parts: Sequence[Tensor], values: Values) -> Tensor:
    return _interleaved(parts)[..., 0]


_MODEL = _plain(
    "token_embd.weight:model.embed_tokens.weight output_norm.weight:model.norm.weight output.weight:lm_head.weight"
)
_NORMS = _plain("attn_norm.weight:input_layernorm.weight", "model.layers")
_FFN_NORM = _plain("ffn_norm.weight:post_attention_layernorm.weight", "model.layers")
_VALUE_OUT = _plain(
    """attn_v.weight:self_attn.v_proj.weight attn_v.bias:self_attn.v_proj.bias
    attn_output.weight:self_attn.o_proj.weight attn_output.bias:self_attn.o_proj.bias""",
    "model.layers",
)
_QUERY_KEY = _plain(
    """attn_q.weight:self_attn.q_proj.weight attn_q.bias:self_attn.q_proj.bias
    attn_k.weight:self_attn.k_proj.weight attn_k.bias:self_attn.k_proj.bias""",
    "model.layers",
)
_QK_NORMS = _plain(
    "attn_q_norm.weight:self_attn.q_norm.weight attn_k_norm.weight:self_attn.k_norm.weight", "model.layers"
)
_MLP = _plain(
    """ffn_gate.weight:mlp.gate_proj.weight ffn_up.weight:mlp.up_proj.weight
    ffn_down.weight:mlp.down_proj.weight""",
    "model.layers",
)
_EXPERTS = (
    *_plain("ffn_gate_inp.weight:mlp.gate.weight", "model.layers"),
    *_plain(
        """ffn_gate_exps.weight:mlp.experts.{expert}.gate_proj.weight
        ffn_up_exps.weight:mlp.experts.{expert}.up_proj.weight
        ffn_down_exps.weight:mlp.experts.{expert}.down_proj.weight""",
        "model.layers",
    ),
)


def _shared_expert(name: str) -> tuple[Rule, ...]:
    return _plain(
        f"""ffn_gate_shexp.weight:mlp.{name}.gate_proj.weight ffn_up_shexp.weight:mlp.{name}.up_proj.weight
        ffn_down_shexp.weight:mlp.{name}.down_proj.weight""",
        "model.layers",
    )


_GATED_SHARED = Rule(
    "model.layers.{layer}.mlp.shared_expert_gate.weight",
    ("blk.{layer}.ffn_gate_inp_shexp.weight",),
    read=lambda parts, values: parts[0].reshape(1, -1),
)
_LATENT = (
    *_plain(
        """attn_q.weight:self_attn.q_proj.weight attn_q_a.weight:self_attn.q_a_proj.weight
        attn_q_a_norm.weight:self_attn.q_a_layernorm.weight attn_q_b.weight:self_attn.q_b_proj.weight
        attn_kv_a_mqa.weight:self_attn.kv_a_proj_with_mqa.weight
        attn_kv_a_norm.weight:self_attn.kv_a_layernorm.weight attn_kv_b.weight:self_attn.kv_b_proj.weight
        attn_output.weight:self_attn.o_proj.weight exp_probs_b.bias:mlp.gate.e_score_correction_bias""",
        "model.layers",
    ),
    # The layer that predicts one token more.
    *_plain(
        """nextn.eh_proj.weight:eh_proj.weight nextn.enorm.weight:enorm.weight nextn.hnorm.weight:hnorm.weight
        nextn.embed_tokens.weight:embed_tokens.weight nextn.shared_head_norm.weight:shared_head.norm.weight
        nextn.shared_head_head.weight:shared_head.head.weight""",
        "model.layers",
    ),
    Rule(
        "model.layers.{layer}.self_attn.kv_b_proj.weight",
        ("blk.{layer}.attn_k_b.weight", "blk.{layer}.attn_v_b.weight"),
        read=_join_latent,
    ),
)


def _gpt_oss_experts() -> Iterator[Rule]:
    mlp, layer = "model.layers.{layer}.mlp.experts.", "blk.{layer}."
    gate_up = (layer + "ffn_gate_exps", layer + "ffn_up_exps")
    for hf, gguf in ((mlp + "gate_up_proj", gate_up), (mlp + "down_proj", (layer + "ffn_down_exps",))):
        weights, biases = (tuple(f"{name}.{kind}" for name in gguf) for kind in ("weight", "bias"))
        yield Rule(hf + "_blocks", weights, _mxfp4_codes, is_meant=_is_mxfp4, is_packed=True)
        yield Rule(hf + "_scales", weights, _mxfp4_scales, is_meant=_is_mxfp4, is_packed=True)
        # Where they are not packed, Transformers has them transposed: [experts, in, out].
        yield Rule(
            hf,
            weights,
            lambda parts, values: _interleaved(parts).transpose(1, 2),
            is_meant=lambda values: not _is_mxfp4(values),
        )
        yield Rule(hf + "_bias", biases, lambda parts, values: _interleaved(parts))


def _is_mxfp4(values: Values) -> bool:
    return "quantization_config" in values


TABLES: dict[str, tuple[Rule, ...]] = {
    "llama": (
        *_MODEL,
        *_NORMS,
        *(_rotary("q", kind, "num_attention_heads") for kind in ("weight", "bias")),
        *(_rotary("k", kind, "num_key_value_heads") for kind in ("weight", "bias")),
        *_VALUE_OUT,
        *_FFN_NORM,
        *_MLP,
    ),
    "qwen2": (*_MODEL, *_NORMS, *_QUERY_KEY, *_VALUE_OUT, *_FFN_NORM, *_MLP),
    "qwen3": (*_MODEL, *_NORMS, *_QUERY_KEY, *_QK_NORMS, *_VALUE_OUT, *_FFN_NORM, *_MLP),
    "qwen2moe": (
        *(*_MODEL, *_NORMS, *_QUERY_KEY, *_VALUE_OUT, *_FFN_NORM),
        *(*_EXPERTS, *_shared_expert("shared_expert"), _GATED_SHARED),
    ),
    "qwen3moe": (*_MODEL, *_NORMS, *_QUERY_KEY, *_QK_NORMS, *_VALUE_OUT, *_FFN_NORM, *_EXPERTS),
    "gpt2": (
        *_plain(
            """token_embd.weight:transformer.wte.weight position_embd.weight:transformer.wpe.weight
            output_norm.weight:transformer.ln_f.weight output_norm.bias:transformer.ln_f.bias
            output.weight:lm_head.weight"""
        ),
        *_plain(
            """attn_norm.weight:ln_1.weight attn_norm.bias:ln_1.bias attn_qkv.bias:attn.c_attn.bias
            attn_output.bias:attn.c_proj.bias ffn_norm.weight:ln_2.weight ffn_norm.bias:ln_2.bias
            ffn_up.bias:mlp.c_fc.bias ffn_down.bias:mlp.c_proj.bias""",
            "transformer.h",
        ),
        *(_transposed("attn_qkv", "attn.c_attn"), _transposed("attn_output", "attn.c_proj")),
        *(_transposed("ffn_up", "mlp.c_fc"), _transposed("ffn_down", "mlp.c_proj")),
    ),
    "deepseek2": (
        *(*_MODEL, *_NORMS, *_LATENT, *_FFN_NORM),
        *(*_MLP, *_EXPERTS, *_shared_expert("shared_experts")),
    ),
    "gpt-oss": (
        *(*_MODEL, *_NORMS, *_QUERY_KEY, *_VALUE_OUT),
        *_plain(
            """attn_sinks.weight:self_attn.sinks post_attention_norm.weight:post_attention_layernorm.weight
            ffn_gate_inp.weight:mlp.router.weight ffn_gate_inp.bias:mlp.router.bias""",
            "model.layers",
        ),
        *_gpt_oss_experts(),
    ),
}
