"""A dense decoder (Llama, Qwen 3) as an OpenVINO graph with the weights of a GGUF file, and a side that runs it.

The graph is what OpenVINO's own exporters write: weights as integers with Convert and Multiply, which its CPU plugin
keeps packed and multiplies with activations that it rounds to 8 bits; keys and values as state of the model.

B batch, T tokens, N heads, H head_dim
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from openvino import opset15 as op
from torch import Tensor

from openbook.checkpoint.model_source import open_model
from openbook.models.config import DecoderConfig

if TYPE_CHECKING:
    from decode_sides import Spec

GROUP = 32
_EVERYWHERE = 2**31 - 1


class OpenVinoSide:
    """A compiled graph. Settings: `weights` (int8, int4 or float), and properties of the CPU plugin."""

    def __init__(self, spec: Spec) -> None:
        properties = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": spec.threads,
            "ENABLE_HYPER_THREADING": True,
            **spec.settings,
        }
        weights = properties.pop("weights")
        self.compiled = ov.Core().compile_model(build_graph(spec.path, weights), "CPU", properties)
        self._request = self.compiled.create_infer_request()

    def start(self, num_sequences: int, num_tokens: int) -> None:
        """See `Side.start`; the state grows as it is needed."""
        self._request.reset_state()
        self._beams = np.arange(num_sequences, dtype=np.int32)
        self._length = 0

    def forward(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Side.forward`."""
        num_sequences, num_new = token_ids.shape
        positions = np.broadcast_to(np.arange(self._length, self._length + num_new), token_ids.shape)
        inputs = {"input_ids": token_ids, "position_ids": np.ascontiguousarray(positions), "beam_idx": self._beams}
        self._request.infer(inputs)
        self._length += num_new
        logits: NDArray[np.float32] = self._request.get_output_tensor().data
        return logits.reshape(num_sequences, -1).copy()


def build_graph(path: Path, weights: str) -> ov.Model:
    """From token ids to the logits after the last token, f32 [B, 1, V].

    Args:
        weights: int8 (one scale for each output), int4 (as in Q4_0: one for each 32 weights; the output matrix in
            int8) or float.
    """
    source = open_model(path)
    return _Graph(cast(DecoderConfig, source.config), source.tensors(torch.float32), weights).model()


class _Graph:
    def __init__(self, config: DecoderConfig, tensors: Mapping[str, Tensor], weights: str) -> None:
        self.config, self.tensors, self.weights = config, tensors, weights
        self.ids = op.parameter([-1, -1], np.int64, name="input_ids")
        self.positions = op.parameter([-1, -1], np.int64, name="position_ids")
        self.beams = op.parameter([-1], np.int32, name="beam_idx")
        for node in (self.ids, self.positions, self.beams):
            node.output(0).get_tensor().set_names({node.friendly_name})
        self.batch = op.gather(op.shape_of(self.ids), np.array([0]), np.array(0))
        self.sinks: list[Any] = []

    def model(self) -> ov.Model:
        config = self.config
        table = self.matrix("model.embed_tokens.weight", is_output=config.tie_word_embeddings)
        hidden = op.gather(table, op.convert(self.ids, "i32"), np.array(0))
        rotation = self.rotation()
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            normed = self.norm(hidden, f"{prefix}input_layernorm")
            hidden = op.add(hidden, self.attention(normed, f"{prefix}self_attn.", rotation, layer))
            normed = self.norm(hidden, f"{prefix}post_attention_layernorm")
            hidden = op.add(hidden, self.mlp(normed, f"{prefix}mlp."))
        last = op.slice(hidden, [-1], [_EVERYWHERE], [1], [1])
        output = table if config.tie_word_embeddings else self.matrix("lm_head.weight", is_output=True)
        logits = op.matmul(self.norm(last, "model.norm"), output, False, True)
        return ov.Model([op.result(logits)], self.sinks, [self.ids, self.positions, self.beams], "decoder")

    def matrix(self, name: str, is_output: bool = False) -> Any:
        """Weights [out, in] as f32, from integers that the plugin keeps."""
        values = self.tensors[name].float()
        if self.weights == "float":
            return op.convert(op.constant(values.half().numpy()), "f32")
        if self.weights == "int8" or is_output:
            scale = values.abs().amax(-1, keepdim=True) / 127
            codes = op.constant((values / scale).round().to(torch.int8).numpy())
            return op.convert(op.multiply(op.convert(codes, "f16"), op.constant(scale.half().numpy())), "f32")
        groups = values.view(len(values), -1, GROUP)
        # Q4_0's own codes: the largest of a group is -8 times its scale.
        scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
        whole = (groups / scale.where(scale != 0, 1)).round().clamp(-8, 7).to(torch.int8)
        codes = op.constant(whole.numpy(), dtype=ov.Type.i4)
        expanded = op.multiply(op.convert(codes, "f16"), op.constant(scale.half().numpy()))
        return op.convert(op.reshape(expanded, np.array(values.shape), False), "f32")

    def linear(self, x: Any, name: str) -> Any:
        out = op.matmul(x, self.matrix(f"{name}.weight"), False, True)
        return op.add(out, self.tensors[f"{name}.bias"].float().numpy()) if f"{name}.bias" in self.tensors else out

    def norm(self, x: Any, name: str) -> Any:
        mean = op.reduce_mean(op.power(x, np.float32(2)), np.array([-1]), keep_dims=True)
        inverse = op.divide(np.float32(1), op.sqrt(op.add(mean, np.float32(self.config.rms_norm_eps))))
        return op.multiply(op.multiply(x, inverse), self.tensors[f"{name}.weight"].float().numpy())

    def mlp(self, x: Any, prefix: str) -> Any:
        gate = op.swish(self.linear(x, f"{prefix}gate_proj"))
        return self.linear(op.multiply(gate, self.linear(x, f"{prefix}up_proj")), f"{prefix}down_proj")

    def rotation(self) -> tuple[Any, Any]:
        """Cosine and sine, f32 [B, 1, T, H]."""
        size = self.config.head_dim
        frequencies = self.config.rope_theta ** (-np.arange(0, size, 2) / size)
        places = op.unsqueeze(op.convert(self.positions, "f32"), np.array(1))
        angles = op.matmul(op.constant(frequencies.astype(np.float32).reshape(1, -1, 1)), places, False, False)
        angles = op.transpose(angles, np.array([0, 2, 1]))
        both = op.concat([angles, angles], -1)
        return op.unsqueeze(op.cos(both), np.array(1)), op.unsqueeze(op.sin(both), np.array(1))

    def rotate(self, x_BNTH: Any, rotation: tuple[Any, Any]) -> Any:
        half = self.config.head_dim // 2
        first = op.slice(x_BNTH, [0], [half], [1], [3])
        second = op.slice(x_BNTH, [half], [_EVERYWHERE], [1], [3])
        turned = op.concat([op.multiply(second, np.float32(-1)), first], -1)
        return op.add(op.multiply(x_BNTH, rotation[0]), op.multiply(turned, rotation[1]))

    def heads(self, x: Any, prefix: str, name: str, num_heads: int) -> Any:
        """A projection as [B, N, T, H], normed where the family does so."""
        x_BTNH = op.reshape(self.linear(x, f"{prefix}{name}_proj"), [0, 0, num_heads, self.config.head_dim], True)
        if f"{prefix}{name}_norm.weight" in self.tensors:
            x_BTNH = self.norm(x_BTNH, f"{prefix}{name}_norm")
        return op.transpose(x_BTNH, np.array([0, 2, 1, 3]))

    def attention(self, x: Any, prefix: str, rotation: tuple[Any, Any], layer: int) -> Any:
        num_heads, num_kv = self.config.num_attention_heads, self.config.num_key_value_heads
        q = self.rotate(self.heads(x, prefix, "q", num_heads), rotation)
        k = self.rotate(self.heads(x, prefix, "k", num_kv), rotation)
        v = self.heads(x, prefix, "v", num_kv)
        keys = self.all_heads(self.remembered(k, f"past_key_values.{layer}.key"))
        values = self.all_heads(self.remembered(v, f"past_key_values.{layer}.value"))
        # The plugin's attention with state aligns the causal mask to the last token.
        mixed = op.scaled_dot_product_attention(q, keys, values, causal=True)
        mixed = op.transpose(mixed, np.array([0, 2, 1, 3]))
        size = num_heads * self.config.head_dim
        return self.linear(op.reshape(mixed, [0, 0, size], True), f"{prefix}o_proj")

    def remembered(self, new_BNTH: Any, name: str) -> Any:
        """What was kept of the sequences so far, and the new tokens; all of it is kept."""
        num_kv, size = self.config.num_key_value_heads, self.config.head_dim
        nothing = op.broadcast(np.float32(0), op.concat([self.batch, np.array([num_kv, 0, size])], 0))
        past = op.read_value(nothing, name, ov.Type.f32, ov.PartialShape([-1, num_kv, -1, size]))
        everything = op.concat([op.gather(past, self.beams, np.array(0)), new_BNTH], 2)
        self.sinks.append(op.assign(everything, name))
        return everything

    def all_heads(self, x_BNTH: Any) -> Any:
        """Keys or values of a group of heads, once for each."""
        repeats = self.config.num_attention_heads // self.config.num_key_value_heads
        if repeats == 1:
            return x_BNTH
        num_kv, size = self.config.num_key_value_heads, self.config.head_dim
        # In this form the plugin takes it into its attention, and copies nothing.
        copies = op.multiply(op.unsqueeze(x_BNTH, np.array(2)), np.ones((1, 1, repeats, 1, 1), np.float32))
        return op.reshape(copies, [0, num_kv * repeats, -1, size], True)
