"""The weights of a dense decoder as its files store them, under our names: what native code computes on, without torch.

Nothing is copied that need not be. Quantised rows are given as they stand in a GGUF file (Q8_0, Q4_0, Q4_1), and floats
in the type they are stored in. Copied are: rows of q and k where the file has them in another order (GGUF of Llama:
whole rows of bytes), matrices that a Hugging Face folder has transposed (GPT-2), and what is in another format (Q4_K,
Q5_K, Q6_K, Q5_0, Q5_1, MXFP4, F64), which is expanded to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from openbook.checkpoint.key_map import MISMATCH, Entry, matched, unfitting
from openbook.checkpoint.key_maps import KEY_MAPS
from openbook.checkpoint.model_source import ModelSource
from openbook.checkpoint.raw_matrix import RawMatrix
from openbook.core.errors import UserError
from openbook.models.config import ModelConfig

# Dense decoders, whose tables do nothing to a matrix but to take its rows or transpose it.
RAW_FAMILIES = frozenset({"gpt2", "gpt3", "llama", "mistral", "qwen2", "qwen3"})


class RawWeights(Mapping[str, tuple[RawMatrix, ...]]):
    """The parts, top to bottom, of each of our tensors, by its name in `openbook.models`; made when it is asked for.

    A matrix [rows, columns] has one part, or those that the file has apart: q, k and v of `qkv_proj.weight`, gate and
    up of `gate_up_proj.weight`. Each part has its own `storage`; `data` is in C order and aligned. A vector (norms,
    biases) is one part in float32. `lm_head.weight` is absent where the embedding is the output matrix too.

    Raises:
        UserError: a tensor is missing, is left over, or does not fit the configuration.
    """

    def __init__(self, source: ModelSource) -> None:
        self._config, self._where = source.config, f"the model {source.path}"
        family = self._config.model_type
        if family not in RAW_FAMILIES:
            raise ValueError(f"a model of the family {family} is not a dense decoder")
        self._shapes = _shapes(self._config)
        self._parts: dict[str, tuple[Entry, Callable[[], list[Any]]]] = {
            entry.ours: (entry, read)
            for entry, read in matched(source.raw_matrices(), self._config, KEY_MAPS[family], self._where)
        }

    def __getitem__(self, name: str) -> tuple[RawMatrix, ...]:
        entry, read = self._parts[name]
        parts: list[RawMatrix] = read()
        expected = self._shapes[".".join(name.rsplit(".", 2)[-2:])]
        if any(len(part.shape) != len(expected) or part.shape[1:] != parts[0].shape[1:] for part in parts):
            raise unfitting(entry, parts, self._where)
        if entry.join is not None:
            parts = [entry.join(parts, self._config)]
        given = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        if given != expected:
            raise UserError(
                f"{self._where}: {name} has shape {list(given)}, config.json says {list(expected)}: {MISMATCH}"
            )
        if len(expected) == 1:
            whole = np.concatenate([part.floats() for part in parts])
            return (RawMatrix("f32", expected, whole),)
        return tuple(part.in_order() for part in parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter that a dense decoder may have, by the last two words of its name."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    matrices = {
        "embed_tokens": (config.vocab_size, hidden),
        "embed_positions": (config.max_position_embeddings, hidden),
        "qkv_proj": (queries + 2 * keys, hidden),
        "o_proj": (hidden, queries),
        "gate_up_proj": (2 * inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "lm_head": (config.vocab_size, hidden),
    }
    norms = ("input_layernorm", "post_attention_layernorm", "attn_norm", "mlp_norm", "norm")
    return {
        **{f"{name}.weight": shape for name, shape in matrices.items()},
        **{f"{name}.bias": shape[:1] for name, shape in matrices.items()},
        **{f"{name}.{kind}": (hidden,) for name in norms for kind in ("weight", "bias")},
        **{f"{name}.weight": (head,) for name in ("q_norm", "k_norm")},
    }
