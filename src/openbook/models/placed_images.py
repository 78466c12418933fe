"""Images among the tokens of a batch: what stands in their place, and the positions that follow.

Shapes: B sequences, T tokens of this forward, L tokens of the longest prompt, F image tokens of all prompts,
D hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from openbook.core.errors import UserError
from openbook.models.config import Grid
from openbook.ops.base import Ops


@dataclass(frozen=True)
class PlacedImages:
    """What a model needs of its images, in any forward of these sequences, prompts in pieces included.

    features: [F, D], of all image tokens. rows: int64 [B, L + 1], which of them stands at a place of a sequence;
    negative: none. positions: int64 [3, B, L + 1], of each place in time, rows and columns of images (arXiv 2409.12191,
    section 2.1); behind the last place all three go on by 1.
    """

    features: Tensor
    rows: Tensor
    positions: Tensor

    @classmethod
    def place(
        cls,
        prompts: Sequence[Sequence[int]],
        grids: Sequence[Sequence[Grid]],
        features: Tensor,
        image_token_id: int,
    ) -> Self:
        """Put images where the prompts' image tokens are.

        Args:
            prompts: token ids of each sequence, an image token for each of an image's features.
            grids: of each sequence's images, in order: rows and columns of features.
            features: [F, D], of all images one after the other.

        Raises:
            UserError: a prompt has not as many image tokens as its images have features.
        """
        num_places = max(map(len, prompts)) + 1
        rows = torch.full((len(prompts), num_places), -1)
        columns = []
        num_before = 0
        for row, (prompt, images) in enumerate(zip(prompts, grids, strict=True)):
            places = (torch.tensor(prompt, dtype=torch.int64) == image_token_id).nonzero().squeeze(1)
            num_features = sum(height * width for height, width in images)
            if len(places) != num_features:
                raise UserError(
                    f"a prompt has {len(places):,} image tokens and its images make {num_features:,}: expected one for "
                    "each; fetch config.json, the tokenizer and preprocessor_config.json of the model again"
                )
            rows[row, places] = torch.arange(num_before, num_before + num_features)
            num_before += num_features
            columns.append(torch.cat(list(_positions(places, images, num_places)), dim=1))
        device = features.device
        return cls(features, rows.to(device), torch.stack(columns, dim=1).to(device))

    def embed(self, ops: Ops, x_BTD: Tensor, places_BT: Tensor) -> Tensor:
        """The embedded tokens x [B, T, D] at `places` [B, T] of their sequences, images in their place."""
        return self._put(ops, x_BTD, self.rows.gather(1, places_BT.clamp_max(self.rows.shape[1] - 1)))

    def positions_at(self, places_BT: Tensor) -> Tensor:
        """Positions of the tokens at `places` [B, T] of their sequences, int64 [3, B, T]."""
        last = self.rows.shape[1] - 1
        inside_BT = places_BT.clamp_max(last)
        return self.positions.gather(2, inside_BT.expand(3, -1, -1)) + (places_BT - inside_BT)

    def select(self, rows: Tensor) -> Self:
        """Those of the sequences at `rows`, int64 [B']."""
        return replace(self, rows=self.rows.index_select(0, rows), positions=self.positions.index_select(1, rows))

    def _put(self, ops: Ops, x_BTD: Tensor, rows_BT: Tensor) -> Tensor:
        return torch.where(rows_BT[..., None] < 0, x_BTD, ops.embedding(rows_BT.clamp_min(0), self.features))


class StepImages(PlacedImages):
    """Images among the tokens of one forward alone: `rows` [B, T] and `positions` [3, B, T] are of these tokens.

    Made by who knows the places already, for tokens of many sequences in one batch.
    """

    def embed(self, ops: Ops, x_BTD: Tensor, places_BT: Tensor) -> Tensor:
        """See `PlacedImages.embed`; a table without features changes nothing."""
        return self._put(ops, x_BTD, self.rows) if len(self.features) else x_BTD

    def positions_at(self, places_BT: Tensor) -> Tensor:
        """See `PlacedImages.positions_at`."""
        return self.positions


def _positions(places: Tensor, grids: Sequence[Grid], num_places: int) -> Iterator[Tensor]:
    """Positions of a sequence's stretches of text and images, each int64 [3, tokens], `num_places` in all.

    A text goes on from the highest position before it; an image's tokens have its own position in time, and that plus
    their row and column.
    """
    place = position = num_seen = 0
    for height, width in grids:
        start = int(places[num_seen])
        yield torch.arange(position, position + start - place).expand(3, -1)
        position += start - place
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        yield position + torch.stack([torch.zeros_like(row), row, column]).flatten(1)
        position += max(height, width)
        place = start + height * width
        num_seen += height * width
    yield torch.arange(position, position + num_places - place).expand(3, -1)
