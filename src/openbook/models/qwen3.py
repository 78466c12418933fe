"""Qwen 3, dense (arXiv 2505.09388): pre-norm decoder, grouped-query attention with normalised q and k, SwiGLU."""

from __future__ import annotations

from torch import Tensor, nn

from openbook.models.base import CausalModel
from openbook.models.config import ModelConfig
from openbook.models.context import AttentionContext
from openbook.models.layers.attention import Attention
from openbook.models.layers.linear import Embedding, Linear
from openbook.models.layers.mlp import SwiGLU
from openbook.models.layers.norm import RMSNorm
from openbook.models.layers.rope import rope_tables
from openbook.ops.base import Ops

# B batch, T tokens, D hidden_size, V vocab_size


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each on the normalised stream and added back to it."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int) -> None:
        super().__init__()
        self.ops = ops
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.self_attn = Attention(config, ops, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.mlp = SwiGLU(config, ops)

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

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, ops)
        self.layers = nn.ModuleList(DecoderLayer(config, ops, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)


class Qwen3(CausalModel):
    """A Qwen 3 language model; weights are uninitialised until `init_weights` or a checkpoint fills them."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__(config, ops)
        self.model = Decoder(config, ops)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, ops)

    def hidden_states(self, ids: Tensor, context: AttentionContext, wanted: Tensor | None = None) -> Tensor:
        """See `CausalModel.hidden_states`."""
        x_BTD = self.model.embed_tokens(ids)
        context = context.prepare(self.ops, x_BTD.dtype)
        rope = rope_tables(context.positions, self.config.head_dim, self.config.rope_theta, x_BTD.dtype)
        *earlier, last = self.model.layers
        for layer in earlier:
            x_BTD = layer(x_BTD, rope, context)
        normed: Tensor = self.model.norm(last(x_BTD, rope, context, wanted))
        return normed

    def project(self, hidden: Tensor) -> Tensor:
        """See `CausalModel.project`."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return self.ops.linear(hidden, head.weight)
