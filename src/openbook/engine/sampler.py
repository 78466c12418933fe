"""From logits to tokens, in numpy alone, so that every runner shares it.

The filters work in the order of Transformers' logits warpers: temperature, top-k, top-p, min-p, each on what the one
before it kept. A token's random number is a function of the request's seed and the token's position only (Philox, a
counter-based generator, Salmon et al. 2011), and each row is computed by itself in float64: what shares the batch,
and how the prompt was cut into pieces, changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from openbook.core.errors import UserError
from openbook.engine.request import SamplingParams


def sample(
    logits: NDArray[np.float32], params: Sequence[SamplingParams], positions: Sequence[int]
) -> NDArray[np.int64]:
    """Choose one token for each row.

    Args:
        logits: float32 [B, V].
        params: B sampling parameters.
        positions: B positions, counted from the start of the prompt, at which the new tokens will stand.

    Returns:
        int64 [B]. Among equal logits greedy decoding takes the lowest id.

    Raises:
        UserError: a row's logits are not numbers: the weights are damaged.
    """
    # NaN spreads through max; minus infinity, with which a runner may rule out tokens, does not.
    if not np.isfinite(logits.max(axis=-1)).all():
        raise UserError(
            "the model's logits are not finite: its weights are damaged; `openbook verify` checks a release"
        )
    tokens: NDArray[np.int64] = logits.argmax(axis=-1)
    for row, row_params in enumerate(params):
        if not row_params.is_greedy:
            tokens[row] = _sample_row(logits[row], row_params, positions[row])
    return tokens


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of one token: 53 bits of Philox4x64 with key `seed` and counter `position`."""
    raw = np.random.Philox(key=seed, counter=position).random_raw()
    return float(int(raw) >> 11) * 2.0**-53


def probabilities(logits: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float64]:
    """The distribution that a token is drawn from; what a filter dropped has probability 0.

    Args:
        logits: float32 [V].
        params: with a temperature above 0.

    Returns:
        float64 [V] that sums to 1. Top-k and min-p keep every token that ties with the last one kept.
    """
    scaled = (logits.astype(np.float64) - float(logits.max())) / params.temperature
    weights: NDArray[np.float64] = np.exp(scaled)  # the likeliest token has weight 1, so nothing overflows
    if 0 < params.top_k < len(weights):
        weights[weights < np.partition(weights, -params.top_k)[-params.top_k]] = 0.0
    if params.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]  # mass of the tokens that are more likely
        weights[order[before >= params.top_p * weights.sum()]] = 0.0
    if params.min_p > 0:
        weights[weights < params.min_p] = 0.0
    weights /= weights.sum()
    return weights


def _sample_row(logits: NDArray[np.float32], params: SamplingParams, position: int) -> int:
    # Inverse of the cumulative distribution over ids in ascending order; a token of probability 0 is never hit,
    # because `side="right"` steps over the flat part of the sum.
    cumulative = np.cumsum(probabilities(logits, params))
    drawn = uniform(params.seed, position) * cumulative[-1]
    return int(np.searchsorted(cumulative, drawn, side="right"))
