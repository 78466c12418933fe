"""What every model family is to the rest of the system."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from openbook.core.draws import draw_normal
from openbook.core.errors import UserError
from openbook.core.seeding import derive_seed
from openbook.models.config import Grid, ModelConfig
from openbook.models.context import AttentionContext
from openbook.models.placed_images import PlacedImages
from openbook.ops.base import Ops


class CausalModel(nn.Module):
    """A decoder that predicts the next token.

    Shapes: B batch, T tokens, D hidden_size, V vocab_size.
    """

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        # The output matrix in another layout, where the plain one is needed too, as the embedding.
        self.blocked_output_weight: Tensor | None = None

    @property
    @abstractmethod
    def output_weight(self) -> Tensor:
        """The matrix from features to logits, [V, D]."""

    @abstractmethod
    def hidden_states(self, ids: Tensor, context: AttentionContext, wanted: Tensor | None = None) -> Tensor:
        """ids int64 [B, T] to the last layer's normalised output [B, T, D].

        Args:
            wanted: int64 [M], places in the flattened ids, each at most once: the output is theirs alone, [M, D], and
                the last layer computes for the others only what these attend to. None: all.
        """

    def project(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] to logits [..., V]."""
        return self.ops.linear(hidden, self._multiplied_output_weight())

    def _multiplied_output_weight(self) -> Tensor:
        blocked = self.blocked_output_weight
        return self.output_weight if blocked is None else blocked

    def place_images(
        self, prompts: Sequence[Sequence[int]], patches: Sequence[Sequence[Tensor]], grids: Sequence[Sequence[Grid]]
    ) -> PlacedImages:
        """Images ready for a context; gradients of what is computed with them reach the weights that see.

        Args:
            prompts: token ids of B sequences.
            patches: of each sequence's images, in the order of their places in the prompt; each [P, patch values].
            grids: rows and columns of each image's patches, P in all.

        Raises:
            UserError: the model reads no images, or a prompt has not as many image tokens as its images need.
        """
        rows = zip(patches, grids, strict=True)
        # One image at a time: that bounds the memory.
        features = [self.encode_image(*image) for row in rows for image in zip(*row, strict=True)]
        return self.place_features(prompts, grids, torch.cat(features))

    def encode_image(self, patches: Tensor, grid: Grid) -> Tensor:
        """What stands in the place of an image's tokens, [tokens, D]; arguments as one image's of `place_images`.

        Raises:
            UserError: the model reads no images, or none of such patches.
        """
        raise self._sees_nothing()

    def place_features(
        self, prompts: Sequence[Sequence[int]], grids: Sequence[Sequence[Grid]], features: Tensor
    ) -> PlacedImages:
        """`place_images` of what `encode_image` made of all images, one after the other, [F, D].

        Who asks for positions alone may give no features.

        Raises:
            UserError: as `place_images`.
        """
        raise self._sees_nothing()

    def _sees_nothing(self) -> UserError:
        return UserError(f"a model of the family {self.config.model_type} reads no images: send text only")

    def forward(self, ids: Tensor, context: AttentionContext) -> Tensor:
        """ids int64 [B, T] to logits [B, T, V]."""
        return self.project(self.hidden_states(ids, context))

    def loss(self, ids: Tensor, targets: Tensor, context: AttentionContext, trained: Tensor | None = None) -> Tensor:
        """Sum of the negative log likelihood of `targets`, float32 scalar.

        Args:
            ids: int64 [B, T].
            targets: int64 [B, T], the token that follows each of `ids`; negative where nothing is to be learned.
            trained: int64 [M], where the flattened `targets` are not negative (`trained_positions`): the last
                layer and the logits are computed only there. None: everywhere.
        """
        hidden = self.hidden_states(ids, context, trained)
        targets_M = targets.flatten()
        if trained is None:
            hidden = hidden.flatten(0, 1)
        else:
            targets_M = targets_M.index_select(0, trained)
        return self.ops.linear_cross_entropy(hidden, self._multiplied_output_weight(), targets_M)

    def initial_deviation(self, name: str) -> float:
        """The standard deviation from which training draws the matrix `name` at its start."""
        return self.config.initializer_range


def trained_positions(targets: Tensor) -> Tensor:
    """Where the flattened `targets` are not negative, int64 [M]; M varies: an input to a compiled loss."""
    return (targets.flatten() >= 0).nonzero().squeeze(1)


@torch.no_grad()
def init_weights(model: CausalModel, seed: int) -> None:
    """Fill all parameters: matrices from a normal of their `initial_deviation`, norms with 1, biases and buffers
    with 0.

    Each matrix has draws of its own, from the seed and its name, in float64, rounded to float32 once: they depend on
    nothing but the seed, the name and the shape, and are the same bits on every machine (`draw_normal`).
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or name.endswith("bias"):
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        else:
            drawn = draw_normal(derive_seed(seed, name), parameter.numel()) * model.initial_deviation(name)
            parameter.copy_(torch.from_numpy(drawn.astype(np.float32)).view(parameter.shape))
    for buffer in model.buffers():
        buffer.zero_()
