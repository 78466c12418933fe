"""A runner that computes whole steps in the native core: dense decoders on a CPU, in the exact profile, without torch.

The models in `openbook.models` through `ExactOps` are its specification: both give the same bits, whatever shares a
batch, however a prompt is cut into chunks, and with any number of threads.

Shapes: B sequences, T tokens of a row, M tokens of a step, R rows whose logits are wanted, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from openbook.checkpoint.raw_weights import RAW_FAMILIES
from openbook.core.errors import UserError
from openbook.engine.choices import CacheKind, Profile
from openbook.engine.native_adapters import NativeAdapters
from openbook.engine.paged import BLOCK_TOKENS, PagedCache
from openbook.models.config import DecoderConfig, ModelConfig
from openbook.models.configs.gpt2 import GPT2Config
from openbook.models.rope_frequencies import exact_frequencies
from openbook.ops.native_module import require_native
from openbook.tokenizer.images import ImagePatches

if TYPE_CHECKING:
    from openbook.ops._native import Decoder


# Tokens of one step at most: enough for products to run at full speed, few enough for what is between them to stay in
# the caches.
STEP_TOKENS = 512


def make_decoder(config: ModelConfig) -> Decoder:
    """A native decoder of that shape, whose weights are to be set.

    Raises:
        UserError: it is no dense decoder that the native core knows, or there is no native core.
    """
    native = require_native()
    if config.model_type not in RAW_FAMILIES:
        known = ", ".join(sorted(RAW_FAMILIES))
        raise UserError(
            f"the native runner knows no family {config.model_type}: expected one of {known}; use profile fast"
        )
    is_gpt2 = isinstance(config, GPT2Config)
    layers = range(config.num_hidden_layers)
    decoder: Decoder = native.Decoder(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        num_positions=config.max_position_embeddings if is_gpt2 else 0,
        has_layer_norm=is_gpt2,
        has_swiglu=not is_gpt2,
        norm_eps=_norm_eps(config),
        has_qkv_bias=is_gpt2 or config.model_type == "qwen2",
        has_qk_norm=config.model_type == "qwen3",
        is_tied=config.tie_word_embeddings,
        scales=[_score_scale(config, layer) for layer in layers],
        windows=[config.window(layer) or 0 for layer in layers],
    )
    return decoder


def _norm_eps(config: ModelConfig) -> float:
    if isinstance(config, GPT2Config):
        return config.layer_norm_epsilon
    assert isinstance(config, DecoderConfig)
    return config.rms_norm_eps


def _score_scale(config: ModelConfig, layer: int) -> float:
    """As the families' attention has it."""
    if not isinstance(config, GPT2Config):
        return float(config.head_dim**-0.5)
    scale = float(config.head_dim**-0.5) if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


class RopeTables:
    """cos and sin by position, computed as far as they were asked for; without columns where nothing is rotated."""

    def __init__(self, config: ModelConfig) -> None:
        frequencies: tuple[float, ...] = ()
        self._factor = 1.0
        if isinstance(config, DecoderConfig):
            frequencies, self._factor = exact_frequencies(config.rope_dim, config.rope_theta, config.rope_scaling)
        self._frequencies = np.array(frequencies, dtype=np.float32)
        empty = np.zeros((0, len(frequencies)), dtype=np.float32)
        self._tables = (empty, empty)

    def __call__(self, num_positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The tables of positions 0 to `num_positions` - 1 or more, each float32 [positions, rope_dim / 2]."""
        if len(self._tables[0]) < num_positions:
            num_positions = max(2 * len(self._tables[0]), num_positions, 256)
            cos = np.empty((num_positions, len(self._frequencies)), dtype=np.float32)
            sin = np.empty_like(cos)
            positions = np.arange(num_positions, dtype=np.float32)
            require_native().rope_tables(positions, self._frequencies, cos, sin)
            if self._factor != 1.0:
                cos, sin = cos * np.float32(self._factor), sin * np.float32(self._factor)
            self._tables = (cos, sin)
        return self._tables


def allocate_cache(config: ModelConfig, num_blocks: int, kind: CacheKind) -> tuple[NDArray[np.float32 | np.uint8], ...]:
    """Keys and values of all layers, as `Decoder.step` takes them: two arrays of floats, or one of 8-bit pages."""
    K, H = config.num_key_value_heads, config.head_dim
    shape = (config.num_hidden_layers, num_blocks, K)
    if kind == "float32":
        keys = np.zeros((*shape, H, BLOCK_TOKENS), dtype=np.float32)
        return keys, np.zeros((*shape, BLOCK_TOKENS, H), dtype=np.float32)
    pages_shape = (*shape, require_native().quant_page_bytes(H))
    num_bytes = int(np.prod(pages_shape))
    memory = np.zeros(num_bytes + 63, dtype=np.uint8)
    start = -memory.ctypes.data % 64  # vectors of codes lie on lines of the processor's cache
    return (memory[start : start + num_bytes].reshape(pages_shape),)


class NativeRunner:
    """Wraps a native decoder whose weights are set, see `make_decoder`.

    cache_kind: int8 rounds keys and values, and what is multiplied by them, as activations are rounded in products with
        quantised weights; head_dim is then a multiple of 32.
    """

    profile: Profile = "exact"

    def __init__(self, config: ModelConfig, decoder: Decoder, cache_kind: CacheKind = "float32") -> None:
        self._config, self.decoder, self.rope = config, decoder, RopeTables(config)
        self.adapters = NativeAdapters(decoder)
        self.cache_kind: CacheKind = cache_kind

    @property
    def max_model_len(self) -> int:
        """See `LoadedModel.max_model_len`."""
        return self._config.max_position_embeddings

    @property
    def vocab_size(self) -> int:
        """See `LoadedModel.vocab_size`."""
        return self._config.vocab_size

    @property
    def block_bytes(self) -> int:
        """See `PagedRunner.block_bytes`."""
        return sum(array.nbytes for array in allocate_cache(self._config, 1, self.cache_kind))

    def paged_cache(self, num_blocks: int) -> PagedCache:
        """See `PagedRunner.paged_cache`."""
        from openbook.engine.native_paged import NativePagedCache

        return NativePagedCache(self, self._config, num_blocks)

    def start(self, num_sequences: int, num_tokens: int) -> NativeBatch:
        """See `Runner.start`."""
        return NativeBatch(self, self._config, num_sequences, num_tokens)

    def logits(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Runner.logits`."""
        num_sequences, num_tokens = token_ids.shape
        batch = self.start(num_sequences, num_tokens)
        counts = np.full(num_sequences, num_tokens, dtype=np.int64)
        return batch.append(token_ids, counts, is_every_wanted=True).reshape(num_sequences, num_tokens, -1)


class NativeBatch:
    """Sequences that advance together; see `RunnerBatch`. Pages take memory when they are first written."""

    def __init__(self, runner: NativeRunner, config: ModelConfig, num_sequences: int, num_tokens: int) -> None:
        self._runner, self._vocab_size = runner, config.vocab_size
        num_pages = -(-num_tokens // BLOCK_TOKENS)
        self._cache = allocate_cache(config, num_sequences * num_pages, runner.cache_kind)
        self._block_tables = np.arange(num_sequences * num_pages, dtype=np.int32).reshape(num_sequences, num_pages)
        self._lengths = np.zeros(num_sequences, dtype=np.int64)

    def place_images(self, prompts: Sequence[Sequence[int]], images: Sequence[Sequence[ImagePatches]]) -> None:
        """See `RunnerBatch.place_images`."""
        raise UserError("this model reads no images: send text only")

    def forward(self, token_ids: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `RunnerBatch.forward`."""
        return self.append(token_ids, counts)

    def keep(self, rows: NDArray[np.int64]) -> None:
        """See `RunnerBatch.keep`."""
        self._block_tables, self._lengths = self._block_tables[rows], self._lengths[rows]

    def append(
        self, token_ids: NDArray[np.int64], counts: NDArray[np.int64], *, is_every_wanted: bool = False
    ) -> NDArray[np.float32]:
        """`forward`, or with the logits after every real token, [sum of counts, V], sequence after sequence."""
        num_rows = len(counts)
        sequences = np.repeat(np.arange(num_rows, dtype=np.int32), counts)
        ends = np.cumsum(counts)
        columns = np.arange(len(sequences)) - np.repeat(ends - counts, counts)
        ids = np.ascontiguousarray(token_ids[sequences, columns], dtype=np.int32)
        positions = (self._lengths[sequences] + columns).astype(np.int32)
        is_wanted = np.zeros(len(sequences), dtype=bool)
        is_wanted[slice(None) if is_every_wanted else ends - 1] = True
        cosines, sines = self._runner.rope(int((self._lengths + counts).max()))
        logits = np.empty((int(is_wanted.sum()), self._vocab_size), dtype=np.float32)
        done = 0
        for start in range(0, len(sequences), STEP_TOKENS):
            part = slice(start, start + STEP_TOKENS)
            wanted = np.flatnonzero(is_wanted[part]).astype(np.int32)
            self._runner.decoder.step(
                ids[part],
                positions[part],
                sequences[part],
                self._block_tables,
                *self._cache,
                cosines,
                sines,
                wanted,
                logits[done : done + len(wanted)],
            )
            done += len(wanted)
        self._lengths = self._lengths + counts
        return logits
