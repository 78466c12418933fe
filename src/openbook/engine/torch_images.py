"""The images of sequences whose prompts are read in pieces: each is encoded when its first token is computed.

Shapes: M tokens of a step, D hidden_size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openbook.engine.paged import PagedStep, PromptImages
from openbook.models.base import CausalModel
from openbook.models.placed_images import PlacedImages, StepImages
from openbook.tokenizer.images import ImagePatches

# Kept beyond the step that needed them, the latest ones: features of this many image tokens in all (64 MB at 8192
# features of 2 bytes), and where the images of this many prompts stand.
KEPT_FEATURES = 4096
KEPT_PROMPTS = 256


class StepImageReader:
    """Makes what a step needs of its sequences' images; keeps what the next pieces of their prompts will need."""

    def __init__(self, model: CausalModel, dtype: torch.dtype, device: torch.device) -> None:
        self._model, self._dtype, self._device = model, dtype, device
        self._encoded: OrderedDict[ImagePatches, Tensor] = OrderedDict()
        # By the identity of what the step gave, which is kept beside it so that no other takes its number.
        self._placed: OrderedDict[int, tuple[PromptImages, PlacedImages]] = OrderedDict()

    def read(self, step: PagedStep, shape: tuple[int, int]) -> StepImages | None:
        """Images in the place of the step's image tokens, which lie in `shape`; None if no sequence has any.

        Raises:
            UserError: the model reads no images, or they do not fit their prompt.
        """
        seeing = {number: given for number, given in enumerate(step.images) if given is not None and given.images}
        if not seeing:
            return None
        rows_M = np.full(len(step.positions), -1)
        positions_3M = np.tile(step.positions.astype(np.int64), (3, 1))
        features: list[Tensor] = []
        num_features = 0
        for number, given in seeing.items():
            begin, end = np.searchsorted(step.sequences, [number, number + 1])
            placed = self._place(given)
            places_1T = torch.from_numpy(step.positions[None, begin:end].astype(np.int64))
            positions_3M[:, begin:end] = placed.positions_at(places_1T)[:, 0].numpy()
            numbers_T = placed.rows.gather(1, places_1T.clamp_max(placed.rows.shape[1] - 1))[0].numpy()
            features += self._features(given, numbers_T)
            is_image = numbers_T >= 0
            rows_M[begin:end][is_image] = num_features + np.arange(is_image.sum())
            num_features += int(is_image.sum())
        table = torch.cat(features) if features else torch.empty(0, self._model.config.hidden_size)
        rows, positions = torch.from_numpy(rows_M), torch.from_numpy(positions_3M)
        return StepImages(table, rows.view(shape).to(self._device), positions.view(3, *shape).to(self._device))

    def _features(self, given: PromptImages, numbers_T: NDArray[np.int64]) -> Iterator[Tensor]:
        """Those of a sequence's image tokens in the step; of each token its number among all of them, or negative."""
        wanted = numbers_T[numbers_T >= 0]
        before = 0
        for image in given.images:
            inside = wanted[(wanted >= before) & (wanted < before + image.num_tokens)] - before
            if len(inside):
                yield self._encode(image)[inside[0] : inside[-1] + 1]
            before += image.num_tokens

    def _encode(self, image: ImagePatches) -> Tensor:
        features = self._encoded.get(image)
        if features is None:
            patches = torch.from_numpy(image.patches).to(self._device, self._dtype)
            features = self._encoded[image] = self._model.encode_image(patches, image.grid)
        self._encoded.move_to_end(image)
        while len(self._encoded) > 1 and sum(map(len, self._encoded.values())) > KEPT_FEATURES:
            self._encoded.popitem(last=False)
        return features

    def _place(self, given: PromptImages) -> PlacedImages:
        """Where the images of a prompt stand, on the CPU and without what stands there."""
        _, placed = self._placed.pop(id(given), (given, None))
        if placed is None:
            grids = [image.grid for image in given.images]
            placed = self._model.place_features([given.prompt_ids], [grids], torch.empty(0))
        self._placed[id(given)] = given, placed
        if len(self._placed) > KEPT_PROMPTS:
            self._placed.popitem(last=False)
        return placed
