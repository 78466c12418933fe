"""Quantised inference against llama.cpp's: the same file gives the same text the same probability."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gguf_files import smollm2
from openbook.checkpoint.convert import convert_model
from openbook.engine.model import Model

pytestmark = pytest.mark.peers

WINDOW_TOKENS = 512


def perplexity(logits: Callable[[list[int]], NDArray[np.float32]], ids: list[int]) -> float:
    """Of `ids` in windows without overlap. logits: of what follows each of some ids, float32 [T, V]."""
    total_nats, count = 0.0, 0
    for start in range(0, len(ids), WINDOW_TOKENS):
        window = ids[start : start + WINDOW_TOKENS]
        values = logits(window)[:-1].astype(np.float64)
        targets = values[np.arange(len(window) - 1), window[1:]]
        most = values.max(-1)
        total_nats += float((most + np.log(np.exp(values - most[:, None]).sum(-1)) - targets).sum())
        count += len(window) - 1
    return float(np.exp(total_nats / count))


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0", "Q4_1"])
def test_perplexity_is_within_one_percent(type_name: str, tmp_path: Path) -> None:
    """Of SmolLM2-135M on the licence; Q4_1 is what the package ships, the others are converted from it."""
    from llama_cpp import Llama  # here, as the other tests are collected without it

    path = smollm2()
    if type_name != "Q4_1":
        path = tmp_path / "model.gguf"
        convert_model(smollm2(), path, type_name)
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    ours = Model.load(path)
    ids = ours.tokenizer.encode(text)
    assert len(ids) > 2000
    theirs = Llama(str(path), n_ctx=WINDOW_TOKENS, n_batch=WINDOW_TOKENS, n_threads=1, logits_all=True, verbose=False)

    def their_logits(window: list[int]) -> NDArray[np.float32]:
        theirs.reset()
        theirs.eval(window)
        return np.array(theirs.scores[: len(window)])

    try:
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ids
        peer = perplexity(their_logits, ids)
    finally:
        theirs.close()
    mine = perplexity(lambda window: ours.logits([window])[0], ids)
    print(f"{type_name}: perplexity {mine:.3f}, llama.cpp {peer:.3f}")
    assert mine == pytest.approx(peer, rel=0.01)
