"""Qwen 2 VL and QVQ (arXiv 2409.12191): Qwen 2 with a vision tower, and positions in time, rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openbook.core.errors import UserError
from openbook.models.config import Grid
from openbook.models.configs.qwen2_vl import Qwen2VLConfig
from openbook.models.context import AttentionContext
from openbook.models.layers.rope import rope_tables
from openbook.models.layers.vision import VisionTower
from openbook.models.placed_images import PlacedImages
from openbook.models.qwen2 import Qwen2
from openbook.ops.base import Ops

# B batch, T tokens, J rotated pairs of a head


class Qwen2VL(Qwen2):
    """A Qwen 2 language model that sees; without images it is Qwen 2."""

    config: Qwen2VLConfig

    def __init__(self, config: Qwen2VLConfig, ops: Ops) -> None:
        super().__init__(config, ops)
        self.visual = VisionTower(config.vision_config, ops)

    def encode_image(self, patches: Tensor, grid: Grid) -> Tensor:
        """See `CausalModel.encode_image`."""
        expected = self.config.vision_config.patch_dim
        if patches.shape[1] != expected:
            raise UserError(
                f"an image's patches have {patches.shape[1]} values, config.json says {expected}: it and "
                "preprocessor_config.json do not belong together, fetch both again"
            )
        features: Tensor = self.visual(patches, grid)
        return features

    def place_features(
        self, prompts: Sequence[Sequence[int]], grids: Sequence[Sequence[Grid]], features: Tensor
    ) -> PlacedImages:
        """See `CausalModel.place_features`."""
        merge = self.config.vision_config.spatial_merge_size
        merged = [[(height // merge, width // merge) for height, width in row] for row in grids]
        return PlacedImages.place(prompts, merged, features, self.config.image_token_id)

    def hidden_states(self, ids: Tensor, context: AttentionContext, wanted: Tensor | None = None) -> Tensor:
        """See `CausalModel.hidden_states`."""
        images = context.images
        if images is None:  # the three positions are one, and the sections make no difference
            return super().hidden_states(ids, context, wanted)
        x_BTD = images.embed(self.ops, self.model.embed_tokens(ids), context.positions)
        rope = self._rope(images.positions_at(context.positions), x_BTD.dtype)
        return self.decode(x_BTD, context, wanted, rope)

    def _rope(self, positions_3BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        config = self.config
        tables = rope_tables(self.ops, positions_3BT, config.rope_dim, config.rope_theta, dtype, config.rope_scaling)
        cos_BTJ, sin_BTJ = (
            torch.cat(
                [part[axis] for axis, part in enumerate(torch.split(table, list(config.mrope_section), dim=-1))], dim=-1
            )
            for table in tables
        )
        return cos_BTJ, sin_BTJ
