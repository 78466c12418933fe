"""LoRA adapters as the library PEFT saves them: adapter_config.json and adapter_model.safetensors. No torch here.

Format: `LoraConfig` and `save_pretrained` in https://github.com/huggingface/peft. A matrix W of the model becomes
W + scale B A (arXiv 2106.09685, section 4.1). PEFT has one A and B for each matrix of a Hugging Face checkpoint; where
ours stacks several of those (q, k and v), each updates its own rows.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from openbook.checkpoint.key_map import names_in, spell_out
from openbook.checkpoint.key_maps import KEY_MAPS
from openbook.checkpoint.model_files import PICKLE_SUFFIXES
from openbook.checkpoint.raw_matrix import RawMatrix
from openbook.checkpoint.safetensors_io import RawFiles
from openbook.core.config import Config, convert
from openbook.core.errors import UserError
from openbook.core.files import read_json
from openbook.models.adapter import Adapter, LowRank
from openbook.models.config import ModelConfig
from openbook.models.configs.deepseek import DeepseekConfig
from openbook.models.configs.qwen_moe import Qwen2MoeConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# What PEFT puts before the names of the model's modules.
_PREFIX = "base_model.model."
# Keys of adapter_config.json that say nothing about what an adapter computes: where it comes from, how it was trained
# and started, how weights are laid out when they are merged, and options of what is refused if it is on.
_WITHOUT_MEANING = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
        *("corda_config", "eva_config", "loftq_config", "lora_dropout", "lora_ga_config", "runtime_config"),
        *("ensure_weight_tying", "fan_in_fan_out", "megatron_core", "qalora_group_size"),
    }
)
# Ways to start training that leave the model's own weights as they are. The others (pissa, olora, ...) change them, and
# their adapters fit the changed ones only.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)
_MERGE = (
    "merge it into the model where you trained it (PEFT: merge_and_unload, then save_pretrained) and give that model"
)


class _Settings(Config, frozen=True):
    """The keys of adapter_config.json that decide what is computed."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def rank(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """On B A; with `use_rslora` as arXiv 2312.03732 has it."""
        alpha, rank = _by_pattern(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def adapts(self, module: str) -> bool:
        """Whether the adapter updates that module, by its name (`check_target_module_exists` in PEFT)."""
        if _is_named(self.exclude_modules, module) or not _is_named(self.target_modules, module):
            return False
        targets, layers = self.target_modules, self.layers_to_transform
        if isinstance(targets, str) or module in (targets or ()) or layers is None or layers == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        found = (re.match(rf"(?:.*?\.)?{name}\.(\d+)\.", module) for name in patterns or [r"[^.]*"])
        match = next(filter(None, found), None)
        return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)


class _Matrix(NamedTuple):
    """A matrix of a Hugging Face checkpoint: which of our matrices has it, from which row on, and its shape."""

    ours: str
    first_row: int
    outputs: int
    inputs: int


def read_adapter(path: Path, config: ModelConfig, name: str | None = None) -> Adapter:
    """Read the folder of an adapter for a model of that shape.

    Args:
        name: what to call it; None for the folder's name.

    Raises:
        UserError: a file is missing or damaged, the adapter is more than LoRA of attention and dense feed-forward
            matrices, or tensors are missing, left over or of another shape than the model's.
    """
    where = f"the adapter {path}"
    settings = _settings(path, where)
    tensors = RawFiles([_weights_file(path, where)], where)
    matrices = _matrices(config)
    given = _pairs(tensors, config, matrices, where)
    try:
        lacking = sorted(matrix for matrix in matrices if matrix not in given and settings.adapts(matrix))
        made = {matrix: _low_rank(given[matrix], tensors, matrices[matrix], settings, where) for matrix in given}
    except re.error as error:
        raise UserError(
            f"{path / CONFIG_FILE}: {error.pattern!r} is no regular expression ({error.msg}); correct it"
        ) from error
    if lacking:
        raise UserError(
            f"{where} lacks tensors for {_some(lacking)}, which its target_modules name: it belongs to another model, "
            "or copy it again"
        )
    updates: dict[str, list[LowRank]] = {}
    for matrix, update in made.items():
        updates.setdefault(matrices[matrix].ours, []).append(update)
    in_order = {ours: tuple(sorted(updates[ours], key=lambda update: update.first_row)) for ours in sorted(updates)}
    return Adapter(name or path.resolve().name, _digest(in_order), in_order)


def _settings(path: Path, where: str) -> _Settings:
    file = path / CONFIG_FILE
    if not file.is_file():
        raise UserError(
            f"{where} has no {CONFIG_FILE}: expected a folder that PEFT's save_pretrained wrote; give that one"
        )
    values = read_json(file, "adapter configuration")
    if not isinstance(values, dict):
        raise UserError(f"{file} has an unexpected form, expected a JSON object: copy it again")
    if (kind := values.get("peft_type")) != "LORA":
        raise UserError(f"{file}: peft_type is {kind!r}, only 'LORA' is implemented: {_MERGE}")
    if (bias := values.get("bias", "none")) != "none":
        raise UserError(f"{file}: bias is {bias!r}, only 'none' is implemented: {_MERGE}")
    if (start := values.get("init_lora_weights")) not in _PLAIN_STARTS:
        raise UserError(
            f"{file}: init_lora_weights is {start!r}, which changes the model's own weights too: save it with "
            "path_initial_model_for_weight_conversion (PEFT: save_pretrained), or " + _MERGE
        )
    handled = {"peft_type", "bias", "init_lora_weights", *_WITHOUT_MEANING}
    known = set(_Settings.__struct_fields__)
    for key in sorted(values.keys() - handled - known):
        if values[key]:  # what is off changes nothing, in whatever version of PEFT it came
            raise UserError(f"{file}: {key} is {_short(values[key])}, which is not implemented: {_MERGE}")
    settings = convert({key: values[key] for key in known & values.keys()}, _Settings, str(file))
    ranks = [settings.r, *(settings.rank_pattern or {}).values()]
    if min(ranks) < 1:
        raise UserError(f"{file}: the rank r is {min(ranks)}, expected 1 or more; correct it")
    return settings


def _weights_file(path: Path, where: str) -> Path:
    file = path / WEIGHTS_FILE
    if file.is_file():
        return file
    pickles = sorted(entry.name for entry in path.iterdir() if entry.name.endswith(PICKLE_SUFFIXES))
    if pickles:
        raise UserError(
            f"{where} has its weights only as pickle ({pickles[0]}), which can run any code when it is loaded: convert "
            "it to safetensors where you trust it (PEFT: PeftModel.from_pretrained, then save_pretrained), and give "
            "that folder"
        )
    raise UserError(f"{where} has no {WEIGHTS_FILE}: copy the whole folder again")


def _matrices(config: ModelConfig) -> dict[str, _Matrix]:
    """What can be adapted, by the names of Hugging Face's modules."""
    shapes = _shapes(config)
    found = {}
    for entry in spell_out(KEY_MAPS[config.model_type], config):
        ours, _, kind = entry.ours.rpartition(".")
        shape = shapes.get(".".join(ours.split(".")[3:])) if kind == "weight" else None
        if not ours.startswith("model.layers.") or shape is None:
            continue
        first_row = 0
        for theirs, rows in zip(entry.theirs, entry.rows(config) if entry.rows else shape[:1], strict=True):
            found[theirs.removesuffix(".weight")] = _Matrix(ours, first_row, rows, shape[1])
            first_row += rows
    return found


def _shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the matrices that can be adapted, by their names in a layer.

    Not among them: routers and routed experts, which are no `Linear`, and kv_b_proj of latent attention, whose inputs
    are those of all tokens in the cache.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "mlp.gate_up_proj": (2 * inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shared = 0
    if isinstance(config, Qwen2MoeConfig):
        shared = config.shared_expert_intermediate_size
        shapes["mlp.shared_expert_gate"] = (1, hidden)
    elif isinstance(config, DeepseekConfig):
        shared = config.moe_intermediate_size * config.n_shared_experts
    if shared:
        shapes["mlp.shared_expert.gate_up_proj"] = (2 * shared, hidden)
        shapes["mlp.shared_expert.down_proj"] = (hidden, shared)
    heads = config.num_attention_heads
    if isinstance(config, DeepseekConfig):
        queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        latent = config.q_lora_rank
        attention = {
            "q_proj": (queries, hidden),
            "q_a_proj": (latent or 0, hidden),
            "q_b_proj": (queries, latent or 0),
            "kv_a_proj_with_mqa": (config.kv_lora_rank + config.qk_rope_head_dim, hidden),
            "o_proj": (hidden, heads * config.v_head_dim),
        }
    else:
        queries, keys = heads * config.head_dim, config.num_key_value_heads * config.head_dim
        attention = {"qkv_proj": (queries + 2 * keys, hidden), "o_proj": (hidden, queries)}
    return {**shapes, **{f"self_attn.{name}": shape for name, shape in attention.items()}}


def _pairs(
    tensors: Mapping[str, RawMatrix], config: ModelConfig, matrices: Mapping[str, _Matrix], where: str
) -> dict[str, dict[str, str]]:
    """The names of A and B by the module they are for, in the names that the family's table has for modules."""
    given: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if match is None:
            raise UserError(f"{where} has the tensor {name}, which is no lora_A or lora_B of a matrix: {_MERGE}")
        given.setdefault(match[1], {})[match[2]] = name
    if not given:
        raise UserError(f"{where} has no tensors, expected lora_A and lora_B of some matrices: copy it again")
    # Other spellings of a name become the table's, which takes lm_head.weight for one more copy of the embedding.
    spelled = dict.fromkeys(f"{module}.weight" for module in given if module != "lm_head")
    for theirs, other in names_in(spelled, config, KEY_MAPS[config.model_type], where).items():
        given[theirs.removesuffix(".weight")] = given.pop(other.removesuffix(".weight"))
    if unknown := sorted(given.keys() - matrices.keys()):
        examples = ", ".join(sorted({module.rpartition(".")[2] for module in matrices}))
        raise UserError(
            f"{where} updates {_some(unknown)}, expected only {examples} of the {config.num_hidden_layers} layers of "
            f"this {config.model_type}: use the model it was trained on, or {_MERGE}"
        )
    for module, pair in given.items():
        if lacking := {"A", "B"} - pair.keys():
            raise UserError(f"{where} lacks lora_{lacking.pop()} of {module}: copy it again")
    return given


def _low_rank(
    pair: Mapping[str, str], tensors: Mapping[str, RawMatrix], matrix: _Matrix, settings: _Settings, where: str
) -> LowRank:
    module = pair["A"].removeprefix(_PREFIX).removesuffix(".lora_A.weight")
    rank = settings.rank(module)
    arrays = {}
    for part, expected in (("A", (rank, matrix.inputs)), ("B", (matrix.outputs, rank))):
        stored = tensors[pair[part]]
        if stored.shape != expected:
            raise UserError(
                f"{where}: {pair[part]} has shape {list(stored.shape)}, expected {list(expected)} for rank {rank} and "
                "this model: use the model it was trained on, or copy it again"
            )
        arrays[part] = np.ascontiguousarray(stored.floats(), np.float32)
        if not np.isfinite(arrays[part]).all():
            raise UserError(f"{where}: {pair[part]} holds infinities or NaN: its training failed, use another adapter")
    return LowRank(matrix.first_row, arrays["A"].copy(), arrays["B"] * np.float32(settings.scale(module)))


def _digest(matrices: Mapping[str, tuple[LowRank, ...]]) -> str:
    digest = hashlib.sha256()
    for name, updates in matrices.items():
        for update in updates:
            shapes = f"{name} {update.first_row} {update.a.shape} {update.b.shape}\n"
            digest.update(shapes.encode() + update.a.astype("<f4").tobytes() + update.b.astype("<f4").tobytes())
    return digest.hexdigest()


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that ends the module's name (`get_pattern_key` in PEFT)."""
    found = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, default)


def _is_named(names: list[str] | str | None, module: str) -> bool:
    """By a regular expression, or by the ends of names."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names or ())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
