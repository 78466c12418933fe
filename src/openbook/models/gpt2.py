"""GPT-2 (Radford et al. 2019), and GPT-3's shape (arXiv 2005.14165), of which no weights were published."""

from __future__ import annotations

import math

from torch import Tensor, nn

from openbook.core.errors import UserError
from openbook.models.base import CausalModel
from openbook.models.configs.gpt2 import GPT2Config
from openbook.models.context import AttentionContext
from openbook.models.layers.linear import Embedding, Linear
from openbook.models.layers.norm import LayerNorm
from openbook.ops.base import Ops

# B batch, T tokens, N heads, H head_dim, D hidden_size


class GPT2Attention(nn.Module):
    """Self-attention without rotation; q, k and v come from one matrix, their rows in that order."""

    def __init__(self, config: GPT2Config, ops: Ops, layer: int) -> None:
        super().__init__()
        self.ops = ops
        self.layer = layer
        self.head_dim = config.head_dim
        self.window = config.window(layer)
        self.scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        width = config.num_attention_heads * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, 3 * width, ops, has_bias=True)
        self.o_proj = Linear(width, config.hidden_size, ops, has_bias=True)

    def forward(self, x_BTD: Tensor, context: AttentionContext, wanted: Tensor | None = None) -> Tensor:
        """x [B, T, D] to the same shape, or to [M, D] at `wanted` [M] of the flattened tokens."""
        B, T, _ = x_BTD.shape
        q_BTNH, k_BTNH, v_BTNH = self.qkv_proj(x_BTD).view(B, T, -1, self.head_dim).chunk(3, dim=2)
        out_BTNH = context.attend(self.ops, self.layer, q_BTNH, k_BTNH, v_BTNH, self.scale, window=self.window)
        out_BTD = out_BTNH.reshape(B, T, -1)
        out: Tensor = self.o_proj(out_BTD if wanted is None else self.ops.take(out_BTD.flatten(0, 1), wanted))
        return out


class GPT2MLP(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, config: GPT2Config, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, ops, has_bias=True)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, ops, has_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] to the same shape."""
        out: Tensor = self.down_proj(self.ops.gelu_tanh(self.up_proj(x)))
        return out


class GPT2Layer(nn.Module):
    """Attention and feed-forward, each on the normalised stream and added back to it."""

    def __init__(self, config: GPT2Config, ops: Ops, layer: int) -> None:
        super().__init__()
        self.ops = ops
        self.attn_norm = LayerNorm(config.hidden_size, config.layer_norm_epsilon, ops)
        self.self_attn = GPT2Attention(config, ops, layer)
        self.mlp_norm = LayerNorm(config.hidden_size, config.layer_norm_epsilon, ops)
        self.mlp = GPT2MLP(config, ops)

    def forward(self, x_BTD: Tensor, context: AttentionContext, wanted: Tensor | None = None) -> Tensor:
        """x [B, T, D] to the same shape, or to [M, D] at `wanted` [M] of the flattened tokens."""
        attended = self.self_attn(self.attn_norm(x_BTD), context, wanted)
        x = (x_BTD if wanted is None else self.ops.take(x_BTD.flatten(0, 1), wanted)) + attended
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class GPT2Decoder(nn.Module):
    """The stack without the output projection."""

    def __init__(self, config: GPT2Config, ops: Ops) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, ops)
        self.embed_positions = Embedding(config.max_position_embeddings, config.hidden_size, ops)
        self.layers = nn.ModuleList(GPT2Layer(config, ops, layer) for layer in range(config.num_hidden_layers))
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_epsilon, ops)


class GPT2(CausalModel):
    """A GPT-2 or GPT-3 language model; weights are uninitialised until `init_weights` or a checkpoint fills them."""

    config: GPT2Config

    def __init__(self, config: GPT2Config, ops: Ops) -> None:
        super().__init__(config, ops)
        self.model = GPT2Decoder(config, ops)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, ops)

    def hidden_states(self, ids: Tensor, context: AttentionContext, wanted: Tensor | None = None) -> Tensor:
        """See `CausalModel.hidden_states`."""
        limit = self.config.max_position_embeddings
        if ids.shape[1] > limit:
            raise UserError(f"got a row of {ids.shape[1]} tokens, the model has {limit} positions: shorten it")
        # Padding behind a sequence may stand past the last position; what it gives is not used.
        positions_BT = context.positions.clamp_max(limit - 1)
        x_BTD: Tensor = self.model.embed_tokens(ids) + self.model.embed_positions(positions_BT)
        context = context.prepare(self.ops, x_BTD.dtype)
        *earlier, last = self.model.layers
        for layer in earlier:
            x_BTD = layer(x_BTD, context)
        normed: Tensor = self.model.norm(last(x_BTD, context, wanted))
        return normed

    @property
    def output_weight(self) -> Tensor:
        """See `CausalModel.output_weight`."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return head.weight

    def initial_deviation(self, name: str) -> float:
        """See `CausalModel.initial_deviation`: what adds to the stream starts smaller, by the root of their number."""
        deviation = super().initial_deviation(name)
        is_residual = name.endswith((".o_proj.weight", ".down_proj.weight"))
        return deviation / math.sqrt(2 * self.config.num_hidden_layers) if is_residual else deviation
