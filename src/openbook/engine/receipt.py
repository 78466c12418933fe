"""Receipts: what is needed to compute an answer again, and the digests of it.

In the exact profile whoever has the same weights gets the same tokens, on any CPU and whatever else their engine does.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence as Tokens
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from openbook.checkpoint.model_files import CONFIG_FILE, weight_files
from openbook.core.config import Config
from openbook.core.files import sha256_bytes, sha256_file
from openbook.engine.choices import CacheKind, Dtype, Profile
from openbook.engine.request import FinishReason, Request, SamplingParams

# What beside the weights decides which tokens follow: where an answer ends, and what thinking is.
_TEXT_FILES = ("generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


class Receipt(Config, frozen=True, kw_only=True):
    """One answer.

    Args:
        model: what it was called where it was served.
        weights: `weights_digest` of its files.
        adapter: digest of the adapter's files; None for the model as it is.
        profile, cache, dtype: what it was computed in, as `openbook.load` takes them.
        prompt_ids: the tokens of the prompt, as the template wrote them.
        sampling: how tokens were chosen, the seed included.
        sample: which of the request's samples this is.
        output_ids: all tokens that were generated: thinking, marks, answer, stop token.
        digest: `receipt_digest` of all other fields.
    """

    version: Literal[1] = 1
    model: str
    weights: str
    adapter: str | None = None
    profile: Profile
    cache: CacheKind | None = None
    dtype: Dtype | None = None
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    sample: int = 0
    output_ids: tuple[int, ...]
    finish_reason: FinishReason
    digest: str = ""

    def to_json(self) -> dict[str, Any]:
        """In plain values."""
        values: dict[str, Any] = msgspec.to_builtins(self)
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReceiptMaker:
    """Writes the receipts of one loaded model; the arguments are those of `Receipt`, path is where its files lie."""

    path: Path
    model: str
    profile: Profile
    cache: CacheKind | None = None
    dtype: Dtype | None = None

    def make(
        self, request: Request, sample: int, output_ids: Tokens[int], finish_reason: FinishReason
    ) -> Receipt | None:
        """The receipt of one finished sequence; None where it would not be enough: the prompt had images.

        The first call hashes the model's files, which takes a while for large ones.

        Raises:
            UserError: a file of the model cannot be read any more.
        """
        if request.images or request.adapter is not None:
            return None
        receipt = Receipt(
            model=self.model,
            weights=weights_digest(self.path),
            profile=self.profile,
            cache=self.cache,
            dtype=self.dtype,
            prompt_ids=tuple(request.prompt_ids),
            sampling=request.params,
            sample=sample,
            output_ids=tuple(output_ids),
            finish_reason=finish_reason,
        )
        return msgspec.structs.replace(receipt, digest=receipt_digest(receipt))


def receipt_digest(receipt: Receipt) -> str:
    """SHA-256 over the canonical JSON (sorted keys) of a receipt without its digest."""
    return sha256_bytes(msgspec.json.encode(msgspec.structs.replace(receipt, digest=""), order="sorted"))


def weights_digest(path: Path) -> str:
    """SHA-256 over names and contents of the files of a model folder that decide its answers, or of a GGUF file.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    if path.is_file():
        return _file_digest(path, *_stamp(path))
    names = [CONFIG_FILE, *_TEXT_FILES, *_TEMPLATE_FILES]
    files = {*weight_files(path), *(path / name for name in names if (path / name).is_file())}
    lines = [f"{file.name} {_file_digest(file, *_stamp(file))}\n" for file in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size


@cache
def _file_digest(file: Path, modified_ns: int, num_bytes: int) -> str:
    """Of a file as it was at that time; hashed once."""
    return sha256_file(file)
