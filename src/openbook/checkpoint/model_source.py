"""A model on disk, opened: a Hugging Face folder or a GGUF file, alike to what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from openbook.checkpoint.gguf_config import config_from_gguf
from openbook.checkpoint.gguf_io import read_gguf
from openbook.checkpoint.gguf_pieces import RawGguf, Recipe, recipes
from openbook.checkpoint.model_files import CONFIG_FILE, is_gguf, weight_files
from openbook.checkpoint.raw_matrix import RawMatrix
from openbook.checkpoint.safetensors_io import RawFiles, TensorFiles
from openbook.core.errors import UserError
from openbook.core.files import read_json
from openbook.models.config import ModelConfig
from openbook.models.registry import config_from_hf
from openbook.tokenizer.chat import Chat, read_template
from openbook.tokenizer.gguf_vocab import tokenizer_from_gguf
from openbook.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ModelSource(Protocol):
    """Files are read when something is asked for; all methods raise UserError if one is missing or damaged."""

    path: Path

    @property
    def config_values(self) -> dict[str, Any]:
        """What stands, or would stand, in its config.json."""

    @property
    def config(self) -> ModelConfig:
        """Its shape."""

    def tensors(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Mapping[str, Tensor]:
        """Its weights under Hugging Face's names.

        Args:
            dtype: what block formats are expanded to; None for float32. Other weights are as they are stored.
        """

    def raw_matrices(self) -> Mapping[str, RawMatrix]:
        """The weights of a dense model under Hugging Face's names, as they are stored; each is read when asked for."""

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""

    def chat_template(self) -> str | None:
        """Its chat template; None for a base model."""

    def chat(self) -> Chat:
        """Its tokenizer and chat template; a model without template is refused."""


def open_model(path: Path) -> ModelSource:
    """Open the folder or GGUF file at `path`."""
    return GgufSource(path) if path.is_file() and is_gguf(path) else FolderSource(path)


class FolderSource:
    """A Hugging Face folder, or one of our releases."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def config_values(self) -> dict[str, Any]:
        """See `ModelSource.config_values`."""
        file = self.path / CONFIG_FILE
        values = read_json(file, "model configuration")
        if not isinstance(values, dict):
            raise UserError(f"{file} has an unexpected form, expected a JSON object: fetch it again")
        return values

    @cached_property
    def config(self) -> ModelConfig:
        """See `ModelSource.config`."""
        return config_from_hf(self.config_values, str(self.path / CONFIG_FILE))

    def tensors(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Mapping[str, Tensor]:
        """See `ModelSource.tensors`; each is read when it is asked for."""
        from openbook.checkpoint.fp8 import FP8_SCALES, ExpandedFp8

        files = TensorFiles(weight_files(self.path), device)
        if any(name.endswith(FP8_SCALES) for name in files):
            return ExpandedFp8(files, dtype, f"the model {self.path}")
        return files

    def raw_matrices(self) -> Mapping[str, RawMatrix]:
        """See `ModelSource.raw_matrices`."""
        return RawFiles(weight_files(self.path), f"the model {self.path}")

    def tokenizer(self) -> Tokenizer:
        """See `ModelSource.tokenizer`."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path)

    def chat_template(self) -> str | None:
        """See `ModelSource.chat_template`."""
        return read_template(self.path, self._tokenizer)

    def chat(self) -> Chat:
        """See `ModelSource.chat`."""
        return Chat.load(self.path, self._tokenizer)


class GgufSource:
    """A GGUF file, or the first of its parts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = read_gguf(path)

    @cached_property
    def _contents(self) -> tuple[dict[str, Any], dict[str, Recipe]]:
        # Together: a file with tensors that its architecture has not is refused before anything of it is used.
        values = config_from_gguf(self._file)
        return values, recipes(self._file, values)

    @property
    def config_values(self) -> dict[str, Any]:
        """See `ModelSource.config_values`."""
        return self._contents[0]

    @cached_property
    def config(self) -> ModelConfig:
        """See `ModelSource.config`."""
        return config_from_hf(self.config_values, str(self.path))

    def tensors(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Mapping[str, Tensor]:
        """See `ModelSource.tensors`; each is read when it is asked for."""
        from openbook.checkpoint.gguf_map import load_gguf

        return load_gguf(self._file, dtype)[1]

    def raw_matrices(self) -> Mapping[str, RawMatrix]:
        """See `ModelSource.raw_matrices`."""
        return RawGguf(self.path, *self._contents)

    def tokenizer(self) -> Tokenizer:
        """See `ModelSource.tokenizer`."""
        return tokenizer_from_gguf(self._file.metadata)

    def chat_template(self) -> str | None:
        """See `ModelSource.chat_template`."""
        template = self._file.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    def chat(self) -> Chat:
        """See `ModelSource.chat`."""
        template = self.chat_template()
        if template is None:
            raise UserError(f"{self.path} has no chat template (tokenizer.chat_template): use a model made for chat")
        return Chat(self.tokenizer(), template)
