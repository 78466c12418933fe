"""What the engine asks of whatever computes logits. The engine is numpy only; a runner may be torch or native code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from openbook.engine.choices import Profile
from openbook.tokenizer.images import ImagePatches


class RunnerBatch(Protocol):
    """Sequences that advance together, with their keys and values."""

    def place_images(self, prompts: Sequence[Sequence[int]], images: Sequence[Sequence[ImagePatches]]) -> None:
        """Put images in the place of the image tokens of the prompts that are to come; call it before any forward.

        Args:
            prompts: token ids, one list for each sequence.
            images: those of each prompt, in order.

        Raises:
            UserError: the model reads no images, or they do not fit the prompts.
        """

    def forward(self, token_ids: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append tokens to every sequence and return what follows the last one.

        Args:
            token_ids: int64 [B, T], rows padded on the right with anything.
            counts: int64 [B], how many tokens of each row are real, 1 to T; they take the sequence's next positions.

        Returns:
            float32 [B, V], the logits after each row's last real token.
        """

    def keep(self, rows: NDArray[np.int64]) -> None:
        """Drop all sequences but `rows`, int64 [B'], ascending."""


class LoadedModel(Protocol):
    """What all runners say of their model."""

    @property
    def profile(self) -> Profile:
        """The numerics profile that it computes in."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of one sequence, prompt and answer together."""

    @property
    def vocab_size(self) -> int:
        """Number of logits."""


class Runner(LoadedModel, Protocol):
    """A model that is ready to compute batches of sequences from prompt to last token."""

    def start(self, num_sequences: int, num_tokens: int) -> RunnerBatch:
        """An empty batch with room for `num_tokens` tokens in each of `num_sequences` sequences."""

    def logits(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits after every token of whole rows: int64 [B, T] to float32 [B, T, V]."""
