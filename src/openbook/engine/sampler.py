"""From logits to tokens, in numpy alone, so that every runner shares it.

The filters work in the order of Transformers' logits warpers: temperature, top-k, top-p, min-p, each on what the one
before it kept. A token's random number is a function of the request's seed and the token's position only (Philox, a
counter-based generator, Salmon et al. 2011), and each row is computed by itself in float64: what shares the batch,
and how the prompt was cut into pieces, changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from openbook.core.errors import UserError
from openbook.engine.events import TokenLogprob
from openbook.engine.request import SamplingParams


def sample(
    logits: NDArray[np.float32],
    params: Sequence[SamplingParams],
    positions: Sequence[int],
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
            tokens[row] = sample_one(logits[row], row_params, positions[row])
    return tokens


def sample_one(logits: NDArray[np.float32], params: SamplingParams, position: int, index: int = 0) -> int:
    """Draw the token that will stand at `position`, from logits float32 [V], at a temperature above 0.

    index: which of its request's samples it belongs to.
    """
    # Inverse of the cumulative distribution over ids in ascending order; a token of probability 0 is never hit,
    # because `side="right"` steps over the flat part of the sum.
    cumulative = np.cumsum(probabilities(logits, params))
    drawn = uniform(params.seed, position, index) * cumulative[-1]
    return int(np.searchsorted(cumulative, drawn, side="right"))


def penalise(
    logits: NDArray[np.float32], params: SamplingParams, prompt_ids: NDArray[np.int64], counts: Mapping[int, int]
) -> None:
    """Apply penalties and biases to logits float32 [V], in place.

    The repetition penalty counts prompt and answer (arXiv 1909.05858, section 4.1), the presence and the frequency
    penalty the answer alone, as OpenAI's API documents them; biases come last.

    Args:
        prompt_ids: the unlike token ids of the prompt.
        counts: how often each token stands in the answer so far.
    """
    new = np.fromiter(counts, np.int64, len(counts))
    if params.repetition_penalty != 1:
        seen = np.union1d(prompt_ids, new)
        penalty = np.float32(params.repetition_penalty)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    if len(new) and (params.presence_penalty or params.frequency_penalty):
        times = np.fromiter(counts.values(), np.float32, len(counts))
        logits[new] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * times
    for token_id, bias in params.logit_bias:
        logits[token_id] += np.float32(bias)


def token_logprob(logits: NDArray[np.float32], token_id: int, num_top: int) -> TokenLogprob:
    """How likely a token is by the model's own logits float32 [V], and the `num_top` likeliest; sums in float64."""
    shifted = logits.astype(np.float64) - float(logits.max())
    logprobs = shifted - np.log(np.exp(shifted).sum())
    top: list[tuple[int, float]] = []
    if num_top:
        ids = np.argpartition(-logprobs, min(num_top, len(logprobs) - 1))[:num_top]
        ids = ids[np.lexsort((ids, -logprobs[ids]))]
        top = [(int(one), float(logprobs[one])) for one in ids]
    return TokenLogprob(token_id=token_id, logprob=float(logprobs[token_id]), top=top)


def uniform(seed: int, position: int, index: int = 0) -> float:
    """The random number in [0, 1) of one token: 53 bits of Philox4x64 with key `seed` and counter (position, index).

    index: which of a request's samples it belongs to.
    """
    raw = np.random.Philox(key=seed, counter=[position, index, 0, 0]).random_raw()
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
