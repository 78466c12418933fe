"""The pre-norm decoder that most families share; a family says what its attention and feed-forward are."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from openbook.models.base import CausalModel
from openbook.models.config import DecoderConfig
from openbook.models.context import AttentionContext
from openbook.models.layers.linear import Embedding, Linear
from openbook.models.layers.norm import RMSNorm
from openbook.models.layers.rope import rope_tables
from openbook.ops.base import Ops

# B batch, T tokens, D hidden_size, V vocab_size

ConfigT = TypeVar("ConfigT", bound=DecoderConfig)


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each on the normalised stream and added back to it."""

    def __init__(
        self,
        config: DecoderConfig,
        ops: Ops,
        self_attn: nn.Module,
        mlp: nn.Module,
        norm: type[RMSNorm] = RMSNorm,
    ) -> None:
        super().__init__()
        self.ops = ops
        self.input_layernorm = norm(config.hidden_size, config.rms_norm_eps, ops)
        self.self_attn = self_attn
        self.post_attention_layernorm = norm(config.hidden_size, config.rms_norm_eps, ops)
        self.mlp = mlp

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], context: AttentionContext, wanted: Tensor | None = None
    ) -> Tensor:
        """x [B, T, D] to the same shape, or to [M, D] at `wanted` [M] of the flattened tokens."""
        attended = self.self_attn(self.input_layernorm(x_BTD), rope, context, wanted)
        x = (x_BTD if wanted is None else self.ops.take(x_BTD.flatten(0, 1), wanted)) + attended
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """The stack without the output projection; named `model` in a checkpoint."""

    def __init__(
        self, config: DecoderConfig, ops: Ops, layers: list[DecoderLayer], norm: type[RMSNorm] = RMSNorm
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, ops)
        self.layers = nn.ModuleList(layers)
        self.norm = norm(config.hidden_size, config.rms_norm_eps, ops)


class DecoderModel(CausalModel, Generic[ConfigT]):
    """A language model of decoder layers; weights are uninitialised until `init_weights` or a checkpoint fills them."""

    config: ConfigT
    norm_type: ClassVar[type[RMSNorm]] = RMSNorm

    def __init__(self, config: ConfigT, ops: Ops) -> None:
        super().__init__(config, ops)
        layers = [
            DecoderLayer(config, ops, self.make_attention(layer), self.make_mlp(layer), self.norm_type)
            for layer in range(config.num_hidden_layers)
        ]
        self.model = Decoder(config, ops, layers, self.norm_type)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, ops)

    @abstractmethod
    def make_attention(self, layer: int) -> nn.Module:
        """The attention of decoder layer `layer`: called with (x, rope tables, context, wanted)."""

    @abstractmethod
    def make_mlp(self, layer: int) -> nn.Module:
        """The feed-forward of decoder layer `layer`: x [..., D] to the same shape."""

    def rope(self, context: AttentionContext, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin for all layers, each [B, T, rope_dim / 2]."""
        config = self.config
        return rope_tables(self.ops, context.positions, config.rope_dim, config.rope_theta, dtype, config.rope_scaling)

    def hidden_states(self, ids: Tensor, context: AttentionContext, wanted: Tensor | None = None) -> Tensor:
        """See `CausalModel.hidden_states`."""
        return self.decode(self.model.embed_tokens(ids), context, wanted)

    def decode(
        self,
        x_BTD: Tensor,
        context: AttentionContext,
        wanted: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """`hidden_states` of embedded tokens, [B, T, D]; rope: what `rope` gives, where it is otherwise."""
        context = context.prepare(self.ops, x_BTD.dtype)
        rope = self.rope(context, x_BTD.dtype) if rope is None else rope
        *earlier, last = self.model.layers
        for layer in earlier:
            x_BTD = layer(x_BTD, rope, context)
        normed: Tensor = self.model.norm(last(x_BTD, rope, context, wanted))
        return normed

    @property
    def output_weight(self) -> Tensor:
        """See `CausalModel.output_weight`."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return head.weight
