"""A whole model from a GGUF file to what a Hugging Face folder holds, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openbook.checkpoint.gguf_config import config_from_gguf, llama3_factors, metadata_from_config
from openbook.checkpoint.gguf_io import (
    FORMATS,
    BlockFormat,
    Bytes,
    GgufFile,
    MetadataValue,
    TensorPlan,
    read_gguf,
    write_gguf,
)
from openbook.checkpoint.gguf_names import Rule, Values, rules_for
from openbook.checkpoint.gguf_pieces import Piece, Recipe, recipes, unfitting
from openbook.checkpoint.gguf_quant import dequantise, quantise, writable_format
from openbook.checkpoint.key_convert import to_hf
from openbook.checkpoint.key_map import names_in, require_names
from openbook.checkpoint.key_maps import KEY_MAPS
from openbook.core.errors import UserError
from openbook.models.config import ModelConfig
from openbook.models.registry import build_model, config_from_hf
from openbook.ops.torch_ops import TorchOps

# `general.file_type` by the type that was asked for (llama_ftype in llama.h).
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
_UNUSED_TOKEN = 5  # a token type
_MISMATCH = "weights and config.json do not belong together, fetch both again"


class GgufTensors(Mapping[str, Tensor]):
    """Hugging Face tensors of a file. Each is read, and its weights expanded, when it is asked for, and not kept."""

    def __init__(self, readers: Mapping[str, Callable[[bool], Tensor]]) -> None:
        self._readers = dict(readers)

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name](False)

    def outline(self, name: str) -> Tensor:
        """A tensor's shape and dtype: without its weights, on the device "meta"."""
        return self._readers[name](True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def load_gguf(source: Path | GgufFile, dtype: torch.dtype | None = None) -> tuple[Values, GgufTensors]:
    """A model file as the values of its config.json and its tensors under Hugging Face's names.

    Args:
        source: a path, or what `read_gguf` made of it.
        dtype: of the weights; None: as stored for F32, F16 and BF16 (then they are views of the mapped file, private
            to this process), float32 for block formats. Experts of gpt-oss in MXFP4 stay packed, as in its own folder.

    Raises:
        UserError: the file is damaged, of an architecture that we do not read, or has tensors that we do not know.
    """
    file = read_gguf(source) if isinstance(source, Path) else source
    values = config_from_gguf(file)
    readers = {name: _reader(name, recipe, values, dtype, file.path) for name, recipe in recipes(file, values).items()}
    return values, GgufTensors(readers)


def save_gguf(
    path: Path,
    config_values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer_metadata: Mapping[str, MetadataValue],
    type_name: str,
) -> None:
    """Write a model of a dense family as one GGUF file, whole or not at all.

    Args:
        config_values: of its config.json.
        tensors: its weights under Hugging Face's names; each is asked for once.
        tokenizer_metadata: `tokenizer.*` and what `general.*` is known; a vocabulary smaller than the model's is
            filled up with unused tokens.
        type_name: F32, F16, BF16, Q8_0 or Q4_0. Norms, biases and positions stay F32; the output of a Q4_0 model is
            Q8_0, as it suffers most; matrices whose rows do not divide into blocks are F16.

    Raises:
        UserError: the family cannot be written, weights and configuration do not fit, or the file cannot be written.
    """
    writable_format(type_name)
    config = config_from_hf(config_values, "the model")
    metadata = metadata_from_config(config)
    architecture = str(metadata["general.architecture"])
    shapes = {name: tuple(tensor.shape) for name, tensor in _expected(config).items()}
    table = KEY_MAPS[config.model_type]
    require_names(tensors, config, table, "the model")
    names = names_in(tensors, config, table, "the model")
    metadata |= {"general.file_type": _FILE_TYPES[type_name], "general.quantization_version": 2}
    metadata |= _filled_up(tokenizer_metadata, config.vocab_size)
    values = dict(config_values) | {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
    }
    plans, sources = [], []
    if factors := llama3_factors(config):
        plans.append(TensorPlan("rope_freqs.weight", (len(factors),), FORMATS["F32"]))
        sources.append(lambda: torch.tensor(factors))
    for rule, layer in rules_for(architecture, range(config.num_hidden_layers)):
        name, gguf_name = rule.hf.format(layer=layer), rule.gguf[0].format(layer=layer)
        if name not in shapes:
            continue
        shape = tuple(rule.write(torch.empty(shapes[name], device="meta"), values).shape)
        is_head = gguf_name == "output.weight" or (config.tie_word_embeddings and gguf_name == "token_embd.weight")
        plans.append(TensorPlan(gguf_name, shape, _stored_format(gguf_name, shape, type_name, is_head)))
        sources.append(_source(tensors, names[name], shapes[name], rule, values))
    data = (_raw(source, plan) for source, plan in zip(sources, plans, strict=True))
    write_gguf(path, metadata, plans, data)


def _reader(
    name: str, recipe: Recipe, values: Values, dtype: torch.dtype | None, path: Path
) -> Callable[[bool], Tensor]:
    rule, pieces = recipe

    def read(is_outline: bool) -> Tensor:
        make = _blocks if rule.is_packed else partial(_weights, dtype=dtype)
        try:
            made: Tensor = rule.read([make(piece, is_outline) for piece in pieces], values)
            return made.contiguous()
        except (RuntimeError, ValueError, IndexError) as error:
            raise unfitting(path, name, pieces) from error

    return read


def _raw_bytes(piece: Piece, is_outline: bool) -> Tensor:
    if is_outline:
        return torch.empty(piece.num_bytes, dtype=torch.uint8, device="meta")
    return torch.from_numpy(piece.raw)


def _blocks(piece: Piece, is_outline: bool) -> Tensor:
    block_format = piece.tensor.format
    num_blocks = piece.shape[-1] // block_format.block_size
    return _raw_bytes(piece, is_outline).view(*piece.shape[:-1], num_blocks, block_format.block_bytes)


def _weights(piece: Piece, is_outline: bool, dtype: torch.dtype | None) -> Tensor:
    return dequantise(_raw_bytes(piece, is_outline), piece.tensor.format, dtype).view(piece.shape)


def _expected(config: ModelConfig) -> Mapping[str, Tensor]:
    """Names and shapes of a model's tensors as Hugging Face has them, without memory."""
    model = build_model(config, TorchOps(), device="meta")
    return to_hf(model.state_dict(), config, KEY_MAPS[config.model_type])


def _stored_format(name: str, shape: tuple[int, ...], type_name: str, is_head: bool) -> BlockFormat:
    if len(shape) == 1 or name.endswith("_norm.weight") or name == "position_embd.weight":
        return FORMATS["F32"]
    block_format = FORMATS["Q8_0" if type_name == "Q4_0" and is_head else type_name]
    return FORMATS["F16"] if shape[-1] % block_format.block_size else block_format


def _source(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], rule: Rule, values: Values
) -> Callable[[], Tensor]:
    def source() -> Tensor:
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise UserError(f"{name} has shape {list(tensor.shape)}, config.json says {list(shape)}: {_MISMATCH}")
        return rule.write(tensor, values)

    return source


def _raw(source: Callable[[], Tensor], plan: TensorPlan) -> Bytes:
    raw: Bytes = quantise(source(), plan.format, plan.name).numpy()
    return raw


def _filled_up(metadata: Mapping[str, MetadataValue], vocab_size: int) -> dict[str, MetadataValue]:
    """A vocabulary of the model's size: llama.cpp takes the number of tokens from it."""
    filled = dict(metadata)
    tokens = filled.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return filled
    if len(tokens) > vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokens):,} tokens, the model {vocab_size:,}: the two do not belong together, "
            "fetch both again"
        )
    unused = range(len(tokens), vocab_size)
    filled["tokenizer.ggml.tokens"] = tokens + [f"[PAD{index}]" for index in unused]
    for key, filler in (("tokenizer.ggml.token_type", _UNUSED_TOKEN), ("tokenizer.ggml.scores", -1e6)):
        if isinstance(given := filled.get(key), list):
            filled[key] = given + [filler] * len(unused)
    return filled
