"""DeepSeek V3's head for one more token (arXiv 2412.19437, section 2.2): it drafts what follows the next token.

The published files carry it as one more decoder layer behind the last. A model is loaded without it; who drafts loads
it beside the model, whose embedding and output matrix it shares.

Shapes: B batch, T tokens, D hidden_size, V vocab_size.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor, nn

from openbook.models.config import ModelConfig
from openbook.models.configs.deepseek import DeepseekV3Config
from openbook.models.context import AttentionContext
from openbook.models.deepseek import DeepseekV3
from openbook.models.layers.decoder import DecoderLayer
from openbook.models.layers.linear import Linear
from openbook.models.layers.mla import LatentAttention
from openbook.models.layers.norm import RMSNorm


class PredictionHead(nn.Module):
    """One decoder layer on the next token's embedding and the model's output at this one."""

    def __init__(self, model: DeepseekV3) -> None:
        super().__init__()
        config, ops = model.config, model.ops
        assert isinstance(config, DeepseekV3Config)
        self._model = [model]  # in a list: its weights are not part of this module
        size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(size, eps, ops), RMSNorm(size, eps, ops)
        self.eh_proj = Linear(2 * size, size, ops)
        self.block = DecoderLayer(
            config, ops, LatentAttention(config, ops, 0), model.make_mlp(config.num_hidden_layers)
        )
        self.norm = RMSNorm(size, eps, ops)

    @property
    def cache_config(self) -> ModelConfig:
        """What a `CachedContext` for this head is made with."""
        config: ModelConfig = msgspec.structs.replace(self._model[0].config, num_hidden_layers=1)
        return config

    def forward(self, hidden_BTD: Tensor, next_ids: Tensor, context: AttentionContext) -> Tensor:
        """The head's normalised output [B, T, D]; `logits` makes logits of it.

        Args:
            hidden_BTD: the model's `hidden_states` at T tokens, in the dtype of the weights.
            next_ids: int64 [B, T], the token behind each of them.
            context: positions and keys of this head; positions count alike for model and head, or from 0.
        """
        model = self._model[0]
        embedded = model.model.embed_tokens(next_ids)
        x_BTD = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden_BTD)], -1))
        context = context.prepare(model.ops, x_BTD.dtype)
        out: Tensor = self.norm(self.block(x_BTD, model.rope(context, x_BTD.dtype), context))
        return out

    def logits(self, out: Tensor) -> Tensor:
        """The head's output [..., D] to logits [..., V] of the token behind the next one."""
        return self._model[0].project(out)

    @torch.inference_mode()
    def draft(self, hidden_BTD: Tensor, next_ids: Tensor, context: AttentionContext) -> Tensor:
        """The likeliest token behind the last of `next_ids`, int64 [B]; arguments as of `forward`."""
        return self.logits(self(hidden_BTD, next_ids, context)[:, -1]).argmax(-1)
