"""What computes logits in the benchmarks of inference: Openbook and its peers behind one small seam, each in a process.

A side lives in a process of its own, so that no thread pool or memory of another is measured with it; the sides take
turns, and one that waits does nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int64]
Logits = NDArray[np.float32]


class Side(Protocol):
    """A loaded model."""

    def start(self, num_sequences: int, num_tokens: int) -> None:
        """Forget all sequences, and make room for others."""

    def forward(self, token_ids: TokenIds) -> Logits:
        """Append tokens, int64 [B, T], to the sequences; float32 [B, V], the logits after the last of each."""


class Spec(NamedTuple):
    """A side: who computes, on which file, and with which settings of its own."""

    system: str
    path: Path
    threads: int
    settings: dict[str, Any]


class OpenbookSide:
    """Openbook in the exact profile."""

    def __init__(self, spec: Spec) -> None:
        from openbook.checkpoint.model_source import open_model
        from openbook.engine.load import choose_runner
        from openbook.ops import _native

        _native.set_num_threads(spec.threads)
        self._runner = choose_runner(open_model(spec.path), "cpu", None, "exact", spec.settings.get("cache"))

    def start(self, num_sequences: int, num_tokens: int) -> None:
        """See `Side.start`."""
        self._batch = self._runner.start(num_sequences, num_tokens)

    def forward(self, token_ids: TokenIds) -> Logits:
        """See `Side.forward`."""
        return self._batch.forward(token_ids, np.full(len(token_ids), token_ids.shape[1]))


class LlamaCppSide:
    """llama.cpp through the functions of its C interface, with its own choice of attention; cache in half floats."""

    def __init__(self, spec: Spec) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._threads, self._settings = spec.threads, spec.settings
        silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self._silent = silent  # the library keeps only its address
        llama_cpp.llama_log_set(silent, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(spec.path).encode(), llama_cpp.llama_model_default_params()
        )
        if self._model is None:
            raise SystemExit(f"llama.cpp cannot load {spec.path}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context: Any = None

    def start(self, num_sequences: int, num_tokens: int) -> None:
        """See `Side.start`."""
        lib = self._lib
        if self._context is not None:
            lib.llama_free(self._context)
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = num_sequences * (-(-num_tokens // 256) * 256)  # it rounds a sequence's cells up to 256
        parameters.n_batch = parameters.n_ctx
        parameters.n_seq_max = num_sequences
        parameters.n_threads = parameters.n_threads_batch = self._threads
        for name, value in self._settings.items():
            setattr(parameters, name, value)
        self._context = lib.llama_init_from_model(self._model, parameters)
        if self._context is None:
            raise SystemExit(f"llama.cpp has no context of {num_sequences} sequences of {num_tokens} tokens")
        self._length = 0

    def forward(self, token_ids: TokenIds) -> Logits:
        """See `Side.forward`."""
        lib = self._lib
        num_sequences, num_new = token_ids.shape
        batch = lib.llama_batch_init(token_ids.size, 0, 1)
        batch.n_tokens = token_ids.size
        for index, token in enumerate(token_ids.ravel().tolist()):
            row, place = divmod(index, num_new)
            batch.token[index] = token
            batch.pos[index] = self._length + place
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row
            batch.logits[index] = place == num_new - 1
        failed = lib.llama_decode(self._context, batch)
        if failed:
            raise SystemExit(f"llama_decode of {token_ids.shape} tokens failed with {failed}")
        self._length += num_new
        rows = [
            np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, (row + 1) * num_new - 1), (self._vocab_size,))
            for row in range(num_sequences)
        ]
        logits: Logits = np.stack(rows)
        lib.llama_batch_free(batch)
        return logits


def open_side(spec: Spec) -> Side:
    """Load it here."""
    if spec.system == "OpenVINO":
        from openvino_side import OpenVinoSide

        return OpenVinoSide(spec)
    return OpenbookSide(spec) if spec.system == "Openbook" else LlamaCppSide(spec)


class Worker:
    """A side in a process of its own."""

    def __init__(self, spec: Spec) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        # Not a process of multiprocessing: it would import the benchmark and all that this imports, such as torch.
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": str(spec.threads)},
        )
        theirs.close()
        self._pipe.send(spec)
        self._answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()  # which ends it
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def logits(self, token_ids: TokenIds, num_at_once: int) -> Logits:
        """Logits after the last token of each row, [B, V]: the tokens given `num_at_once`, then one by one."""
        logits: Logits = self._ask("logits", token_ids, num_at_once)
        return logits

    def prefill_s(self, token_ids: TokenIds) -> float:
        """Seconds for one forward of int64 [B, T] on empty sequences."""
        return float(self._ask("prefill_s", token_ids))

    def decode_s(self, token_ids: TokenIds, num_new: int) -> float:
        """Seconds for `num_new` further tokens of each sequence, the likeliest each time, behind int64 [B, T]."""
        return float(self._ask("decode_s", token_ids, num_new))

    def resident_bytes(self) -> int:
        """Memory of the process that lies in RAM now, mapped files included."""
        return int(self._ask("resident_bytes"))

    def _ask(self, *request: Any) -> Any:
        self._pipe.send(request)
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise SystemExit("a side's process ended; its message is above") from None


def _serve(pipe: Connection) -> None:
    timed = _Timed(open_side(pipe.recv()))
    pipe.send(None)
    while True:
        try:
            name, *arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(timed, name)(*arguments))


class _Timed:
    """What a `Worker` asks of its side, in the side's process."""

    def __init__(self, side: Side) -> None:
        self._side = side

    def logits(self, token_ids: TokenIds, num_at_once: int) -> Logits:
        self._side.start(*token_ids.shape)
        logits = self._side.forward(token_ids[:, :num_at_once])
        for place in range(num_at_once, token_ids.shape[1]):
            logits = self._side.forward(token_ids[:, place : place + 1])
        return logits

    def prefill_s(self, token_ids: TokenIds) -> float:
        self._side.start(*token_ids.shape)
        began_s = time.perf_counter()
        self._side.forward(token_ids)
        return time.perf_counter() - began_s

    def decode_s(self, token_ids: TokenIds, num_new: int) -> float:
        num_sequences, num_tokens = token_ids.shape
        self._side.start(num_sequences, num_tokens + num_new + 1)
        tokens = self._side.forward(token_ids).argmax(-1)
        began_s = time.perf_counter()
        for _ in range(num_new):
            tokens = self._side.forward(tokens[:, None]).argmax(-1)
        return time.perf_counter() - began_s

    def resident_bytes(self) -> int:
        kilobytes = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)
        return int(kilobytes.split()[1]) * 1024


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
