"""A runner that computes with torch: any family in `openbook.models`, on CPU or CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from openbook.checkpoint.folder import load_model
from openbook.checkpoint.memory import require_memory
from openbook.checkpoint.model_source import ModelSource, open_model
from openbook.checkpoint.raw_weights import RAW_FAMILIES
from openbook.core.errors import UserError, unknown_name
from openbook.engine.choices import CacheKind, Profile
from openbook.engine.decode_layout import lay_out_for_decoding
from openbook.engine.paged import BLOCK_TOKENS
from openbook.engine.torch_paged import TorchPagedCache
from openbook.models.base import CausalModel
from openbook.models.context import CachedContext, DenseContext
from openbook.models.layers.lora import ModelAdapters
from openbook.models.paged_cache import block_bytes
from openbook.models.placed_images import PlacedImages
from openbook.ops.exact_ops import ExactOps
from openbook.ops.native_module import require_native
from openbook.ops.torch_ops import TorchOps
from openbook.tokenizer.images import ImagePatches

# A step that takes less than this on one thread runs on one: waking the others costs more than they give, on a busy
# machine a hundred times more. A thread does some 40 billion multiply-adds a second and reads some 10 GB of weights.
ONE_THREAD_S = 0.01
THREAD_PRODUCTS_PER_S = 4e10
THREAD_BYTES_PER_S = 1e10

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_runner(source: Path | ModelSource, device: str, dtype: str) -> TorchRunner:
    """Load the model in a folder or GGUF file onto `device` ("cpu", "cuda:1") in `dtype` ("float32", "bfloat16").

    Raises:
        UserError: an unknown device or dtype, a file is missing or damaged, or there is too little memory.
    """
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES, f"expected {' or '.join(DTYPES)}")
    place = _device(device)
    if isinstance(source, Path):
        source = open_model(source)
    require_memory(source.path, source.config, device=device, dtype=dtype)
    with _one_thread():  # reading files needs no more, and threads once woken spin on for a while
        return TorchRunner(load_model(source, TorchOps(), place, DTYPES[dtype]))


def load_exact_runner(source: ModelSource, cache: CacheKind = "float32") -> TorchRunner:
    """Load a model whose arithmetic goes through the exact Ops, on the CPU in float32.

    What the native core multiplies as it is stored (a dense decoder's Q8_0, Q4_0 and Q4_1) is that here too.

    Args:
        cache: int8 is slow, and there to compare the native core with: float32 keys and values, rounded at each use.

    Raises:
        UserError: a file is missing or damaged, there is too little memory, or no native core.
    """
    require_native()
    # Only now: they import the native core, and the profile fast does without.
    from openbook.checkpoint.stored_model import load_stored_model
    from openbook.ops.exact_rounded_attention import RoundedCacheOps

    ops = RoundedCacheOps() if cache == "int8" else ExactOps()
    require_memory(source.path, source.config)
    with _one_thread():
        if source.config.model_type in RAW_FAMILIES:
            return TorchRunner(load_stored_model(source, ops))
        return TorchRunner(load_model(source, ops, torch.device("cpu"), torch.float32))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown_name("device", name, ["cpu", "cuda"], "expected cpu, cuda or cuda:N") from None
    num_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"the device {name} is not supported: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise UserError(f"the device {name} is not there: this machine has {num_gpus} CUDA devices; use --device cpu")
    return device


class TorchRunner:
    """Wraps a loaded model; keys and values live on its device in its dtype."""

    def __init__(self, model: CausalModel) -> None:
        self._model = model.eval()
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self._is_laid_out = False
        self.adapters = ModelAdapters(model)

    @property
    def profile(self) -> Profile:
        """See `LoadedModel.profile`."""
        return "exact" if self._model.ops.is_exact else "fast"

    @property
    def max_model_len(self) -> int:
        """See `LoadedModel.max_model_len`."""
        return self._model.config.max_position_embeddings

    @property
    def vocab_size(self) -> int:
        """See `LoadedModel.vocab_size`."""
        return self._model.config.vocab_size

    @property
    def block_bytes(self) -> int:
        """See `PagedRunner.block_bytes`."""
        return block_bytes(self._model.config, BLOCK_TOKENS, self._dtype)

    def paged_cache(self, num_blocks: int) -> TorchPagedCache:
        """See `PagedRunner.paged_cache`."""
        return TorchPagedCache(self._model, num_blocks, self._computing, self.adapters)

    def start(self, num_sequences: int, num_tokens: int) -> _TorchBatch:
        """See `Runner.start`."""
        context = CachedContext(self._model.config, num_sequences, num_tokens, self._dtype, self._device)
        return _TorchBatch(self, context)

    @torch.inference_mode()
    def logits(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Runner.logits`."""
        num_rows, num_tokens = token_ids.shape
        context = DenseContext(num_rows, num_tokens, self._device)
        with self._threads(token_ids.size):
            return _to_numpy(self._model(torch.from_numpy(token_ids).to(self._device), context))

    @torch.inference_mode()
    def last_logits(
        self, token_ids: NDArray[np.int64], counts: NDArray[np.int64], context: CachedContext
    ) -> NDArray[np.float32]:
        """One step of a batch, see `RunnerBatch.forward`; `context` takes the keys and values."""
        context.append(counts.tolist())
        with self._computing(token_ids.size, token_ids.shape[1] == 1):
            hidden_BTD = self._model.hidden_states(torch.from_numpy(token_ids).to(self._device), context)
            # Only the last real token's row goes through the output projection, the largest matrix of a small model.
            last_B = torch.from_numpy(counts - 1).to(self._device)
            hidden_BD = hidden_BTD[torch.arange(len(counts), device=self._device), last_B]
            return _to_numpy(self._model.project(hidden_BD))

    def see(self, prompts: Sequence[Sequence[int]], images: Sequence[Sequence[ImagePatches]]) -> PlacedImages:
        """Images ready for a context, see `RunnerBatch.place_images`."""
        patches = [[torch.from_numpy(image.patches).to(self._device, self._dtype) for image in row] for row in images]
        num_patches = sum(len(image) for row in patches for image in row)
        with self._threads(num_patches):
            return self._model.place_images(prompts, patches, [[image.grid for image in row] for row in images])

    @contextmanager
    def _computing(self, num_tokens: int, is_decoding: bool) -> Iterator[None]:
        """What surrounds a step of `num_tokens` tokens: its threads, and matrices laid out for decoding."""
        with self._threads(num_tokens):
            if is_decoding and not self._is_laid_out:
                # Only now: before the first token it would be waited for.
                lay_out_for_decoding(self._model)
                self._is_laid_out = True
            yield

    def _threads(self, num_tokens: int) -> AbstractContextManager[None]:
        """As many threads as a step of `num_tokens` tokens is worth."""
        products_s = num_tokens * self._num_parameters / THREAD_PRODUCTS_PER_S
        reading_s = self._num_parameters * self._dtype.itemsize / THREAD_BYTES_PER_S
        return _one_thread() if max(products_s, reading_s) < ONE_THREAD_S else nullcontext()


class _TorchBatch:
    def __init__(self, runner: TorchRunner, context: CachedContext) -> None:
        self._runner, self._context = runner, context

    def forward(self, token_ids: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._runner.last_logits(token_ids, counts, self._context)

    @torch.inference_mode()
    def place_images(self, prompts: Sequence[Sequence[int]], images: Sequence[Sequence[ImagePatches]]) -> None:
        self._context.images = self._runner.see(prompts, images)

    @torch.inference_mode()
    def keep(self, rows: NDArray[np.int64]) -> None:
        self._context.select(rows.tolist())


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _to_numpy(logits: torch.Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = logits.float().cpu().numpy()
    return values
