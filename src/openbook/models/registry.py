"""Families by their `model_type`, and the two-way reading of config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

import msgspec

from openbook.core.config import convert
from openbook.core.errors import UserError, unknown_name
from openbook.models.config import DecoderConfig, ModelConfig
from openbook.models.configs.deepseek import DeepseekV2Config, DeepseekV3Config, read_deepseek, read_fp8, write_fp8
from openbook.models.configs.gpt2 import GPT2Config, GPT3Config, read_gpt2, write_gpt2
from openbook.models.configs.gpt_oss import GptOssConfig, read_gpt_oss, write_gpt_oss
from openbook.models.configs.qwen2_vl import Qwen2VLConfig, flatten_qwen2_vl, nest_qwen2_vl
from openbook.models.configs.qwen_moe import Qwen2MoeConfig, Qwen3MoeConfig, read_qwen_moe
from openbook.models.hf_config import (
    WITHOUT_MEANING,
    read_qwen_layers,
    read_rope,
    take_fixed,
    write_qwen_layers,
    write_rope,
)

if TYPE_CHECKING:  # the models need torch; to read what a file says of them needs none
    import torch

    from openbook.models.base import CausalModel
    from openbook.ops.base import Ops

Values = dict[str, Any]  # of a config.json, by key


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: our classes, its name in Transformers, and how its config.json differs from our fields.

    model: "module:class" in `openbook.models`, imported when a model is built. fixed: keys whose one value we
    implement. defaults: what Transformers takes where config.json says nothing, if it is not our default. ignored:
    further keys that do not touch the arithmetic. readers: change the values, in turn, into our fields; each is given
    the file's name for messages. writers: the reverse, with the configuration. flatten: brings what stands in further
    objects to the top before all else. nest: the reverse, after all else.
    """

    model: str
    config: type[ModelConfig]
    architecture: str
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    readers: tuple[Callable[[Values, str], Values], ...] = (read_rope,)
    writers: tuple[Callable[[Values, ModelConfig], Values], ...] = (write_rope,)
    flatten: Callable[[Values, str], Values] | None = None
    nest: Callable[[Values, ModelConfig], Values] | None = None

    @property
    def model_class(self) -> type[CausalModel]:
        """The class of its models; the first time this imports torch."""
        module, name = self.model.split(":")
        found: type[CausalModel] = getattr(import_module(f"openbook.models.{module}"), name)
        return found


# Of a loss that Transformers can add in training.
_ROUTER_LOSS = frozenset({"output_router_logits", "router_aux_loss_coef"})

# Dropout, other heads, and where the arithmetic of scores is widened, which ours always is.
_GPT2_IGNORED = frozenset(
    """
    resid_pdrop embd_pdrop attn_pdrop summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout task_specific_params gradient_checkpointing n_special predict_special_tokens
    reorder_and_upcast_attn
    """.split()  # noqa: SIM905
)

_DEEPSEEK = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "moe_layer_freq": 1}
_DEEPSEEK_TRAINING = frozenset(
    "aux_loss_alpha seq_aux ep_size pretraining_tp auto_map output_router_logits qk_head_dim num_mtp_layers".split()  # noqa: SIM905
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        model="gpt2:GPT2",
        config=GPT2Config,
        architecture="GPT2LMHeadModel",
        fixed={"add_cross_attention": False},
        ignored=_GPT2_IGNORED,
        readers=(read_gpt2,),
        writers=(write_gpt2,),
    ),
    "gpt3": Family(
        model="gpt2:GPT2",
        config=GPT3Config,
        architecture="GPT3LMHeadModel",
        fixed={},
        readers=(read_gpt2,),
        writers=(write_gpt2,),
    ),
    "gpt_oss": Family(
        model="gpt_oss:GptOss",
        config=GptOssConfig,
        architecture="GptOssForCausalLM",
        fixed={"hidden_act": "silu", "attention_bias": True, "attention_dropout": 0.0},
        defaults={
            "tie_word_embeddings": False,
            "head_dim": 64,
            "sliding_window": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "max_position_embeddings": 131072,
        },
        ignored=_ROUTER_LOSS | {"initial_context_length"},  # rope says it too
        readers=(read_gpt_oss, read_rope),
        writers=(write_rope, write_gpt_oss),
    ),
    "llama": Family(
        model="llama:Llama",
        config=DecoderConfig,
        architecture="LlamaForCausalLM",
        fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        defaults={"tie_word_embeddings": False, "max_position_embeddings": 2048},
        ignored=frozenset({"pretraining_tp", "attention_dropout"}),
    ),
    "mistral": Family(
        model="mistral:Mistral",
        config=DecoderConfig,
        architecture="MistralForCausalLM",
        fixed={"hidden_act": "silu"},
        defaults={"tie_word_embeddings": False, "sliding_window": 4096, "max_position_embeddings": 131072},
        ignored=frozenset({"attention_dropout"}),
    ),
    "qwen2": Family(
        model="qwen2:Qwen2",
        config=DecoderConfig,
        architecture="Qwen2ForCausalLM",
        fixed={"hidden_act": "silu", "attention_dropout": 0.0},
        defaults={"tie_word_embeddings": False},
        readers=(read_rope, read_qwen_layers),
        writers=(write_rope, write_qwen_layers),
    ),
    "qwen2_vl": Family(
        model="qwen2_vl:Qwen2VL",
        config=Qwen2VLConfig,
        architecture="Qwen2VLForConditionalGeneration",
        fixed={"hidden_act": "silu", "attention_dropout": 0.0},
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 32768},
        ignored=frozenset({"vision_token_id"}),  # stands for nothing that the model reads
        readers=(read_rope, read_qwen_layers),
        writers=(write_rope, write_qwen_layers),
        flatten=flatten_qwen2_vl,
        nest=nest_qwen2_vl,
    ),
    "qwen3": Family(
        model="qwen3:Qwen3",
        config=DecoderConfig,
        architecture="Qwen3ForCausalLM",
        fixed={"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0},
        defaults={"tie_word_embeddings": False, "head_dim": 128},
        readers=(read_rope, read_qwen_layers),
        writers=(write_rope, write_qwen_layers),
    ),
    "deepseek_v2": Family(
        model="deepseek:DeepseekV2",
        config=DeepseekV2Config,
        architecture="DeepseekV2ForCausalLM",
        # Transformers' V2 router leaves norm_topk_prob aside: better none than one that nobody checked.
        fixed={**_DEEPSEEK, "scoring_func": "softmax", "norm_topk_prob": False, "mlp_bias": False},
        defaults={"tie_word_embeddings": False, "q_lora_rank": 1536},
        ignored=_DEEPSEEK_TRAINING,
        readers=(read_rope, read_deepseek),
    ),
    "deepseek_v3": Family(
        model="deepseek:DeepseekV3",
        config=DeepseekV3Config,
        architecture="DeepseekV3ForCausalLM",
        fixed={**_DEEPSEEK, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        defaults={
            "tie_word_embeddings": False,
            "q_lora_rank": 1536,
            "first_k_dense_replace": 3,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
        },
        ignored=_DEEPSEEK_TRAINING,
        readers=(read_rope, read_deepseek, read_fp8),
        writers=(write_rope, write_fp8),
    ),
    "qwen2_moe": Family(
        model="qwen2_moe:Qwen2Moe",
        config=Qwen2MoeConfig,
        architecture="Qwen2MoeForCausalLM",
        fixed={"hidden_act": "silu", "attention_dropout": 0.0, "qkv_bias": True, "use_sliding_window": False},
        defaults={"tie_word_embeddings": False},
        ignored=_ROUTER_LOSS,
        readers=(read_rope, read_qwen_moe),
    ),
    "qwen3_moe": Family(
        model="qwen3_moe:Qwen3Moe",
        config=Qwen3MoeConfig,
        architecture="Qwen3MoeForCausalLM",
        fixed={"hidden_act": "silu", "attention_dropout": 0.0, "attention_bias": False, "use_sliding_window": False},
        defaults={"tie_word_embeddings": False},
        ignored=_ROUTER_LOSS,
        readers=(read_rope, read_qwen_moe),
    ),
}


def build_model(config: ModelConfig, ops: Ops, device: torch.device | str = "cpu") -> CausalModel:
    """A model of that shape; its weights are uninitialised: call `init_weights` or load a checkpoint.

    On the device "meta" the weights have shapes and no memory.

    Raises:
        UserError: the family is not known.
    """
    import torch

    family = require_family(config.model_type, "the model configuration")
    with torch.device("meta"):
        model = family.model_class(config, ops)
    return model if str(device) == "meta" else model.to_empty(device=device)


def config_from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Read the content of a Hugging Face config.json; `where` names the file in messages.

    Raises:
        UserError: an unknown family, a key whose value we do not implement, an unknown or missing key.
    """
    values = dict(values)
    if "model_type" not in values:
        raise UserError(f"{where}: the key model_type is missing: add it (known: {', '.join(sorted(FAMILIES))})")
    family = require_family(str(values["model_type"]), where)
    if family.flatten is not None:
        values = family.flatten(values, where)
    values = take_fixed(values, family.fixed, where)
    values = {key: value for key, value in values.items() if key not in WITHOUT_MEANING | family.ignored}
    for reader in family.readers:
        values = reader(values, where)
    if values.get("num_key_value_heads", 0) is None:
        del values["num_key_value_heads"]
    values = {**family.defaults, **values}
    heads = values.get("num_attention_heads")
    if "num_key_value_heads" in family.config.__struct_fields__:
        values.setdefault("num_key_value_heads", heads)
    hidden = values.get("hidden_size")
    if values.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int):
        # Of no heads too: the configuration says what is wrong with it.
        values["head_dim"] = hidden // max(heads, 1)
    return convert(values, family.config, where)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json that Transformers reads for `config`."""
    family = require_family(config.model_type, "the model configuration")
    values = msgspec.to_builtins(config)
    for writer in family.writers:
        values = writer(values, config)
    # What a reader would otherwise take from elsewhere is said, even if it is None.
    values |= {key: getattr(config, key) for key in family.defaults if key not in values}
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    values = {"architectures": [family.architecture], **values, **family.fixed}
    return values if family.nest is None else family.nest(values, config)


def require_family(model_type: str, where: str) -> Family:
    """The family of that name; `where` names what asked for it in messages.

    Raises:
        UserError: the family is not known.
    """
    if model_type not in FAMILIES:
        error = unknown_name("model_type", model_type, FAMILIES, f"known: {', '.join(sorted(FAMILIES))}")
        raise UserError(f"{where}: {error}")
    return FAMILIES[model_type]
