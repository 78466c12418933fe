"""How one sequence's next token is chosen: penalties, its answer's grammar, sampling, the end of its thinking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from openbook.core.errors import UserError
from openbook.engine.events import TokenLogprob
from openbook.engine.request import Request
from openbook.engine.sampler import penalise, sample_one, token_logprob

if TYPE_CHECKING:
    from openbook.engine.answer_guide import AnswerGuide


@dataclass(frozen=True)
class NextToken:
    """A token that was chosen; logprob: if the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None


class TokenChooser:
    """Chooses the tokens of one sequence.

    Args:
        request: whose sampling parameters hold.
        index: which of its samples this is.
        guide: keeps thinking to its budget and the answer to its grammar; None where there is neither.
    """

    def __init__(self, request: Request, index: int, guide: AnswerGuide | None) -> None:
        self._params, self._index, self._guide = request.params, index, guide
        params = request.params
        self._has_penalties = bool(
            params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty or params.logit_bias
        )
        needs_prompt = params.repetition_penalty != 1
        self._prompt_ids = np.unique(np.array(request.prompt_ids if needs_prompt else [], dtype=np.int64))

    def choose(self, logits: NDArray[np.float32], position: int, counts: Mapping[int, int]) -> NextToken:
        """The next token.

        Args:
            logits: float32 [V]; not changed.
            position: where it will stand, counted from the start of the prompt.
            counts: how often each token stands in the answer so far.

        Raises:
            UserError: the logits are not numbers, as the weights are damaged, or the grammar can go no further.
        """
        params, steered = self._params, logits
        if self._has_penalties:
            steered = logits.copy()
            penalise(steered, params, self._prompt_ids, counts)
        if self._guide is not None:
            steered = self._guide.masked(steered)
        token_id = int(steered.argmax())
        # NaN wins every comparison of argmax; minus infinity only where nothing else is left.
        if not np.isfinite(steered[token_id]):
            raise UserError(
                "the model's logits are not finite: its weights are damaged; `openbook verify` checks a release"
            )
        if not params.is_greedy:
            token_id = sample_one(steered, params, position, self._index)
        num_top = params.num_logprobs
        return NextToken(token_id, None if num_top is None else token_logprob(logits, token_id, num_top))

    def follow(self, token_id: int) -> list[int]:
        """Take a token of the sequence into account; the tokens that must follow it: those that close its thinking.

        Raises:
            UserError: the grammar can go no further.
        """
        return [] if self._guide is None else self._guide.push(token_id)

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete and nothing can follow it."""
        return self._guide is not None and self._guide.is_finished

    def num_allowed(self, draft_ids: Sequence[int]) -> int:
        """How many of these guesses at the next tokens are worth computing."""
        return len(draft_ids) if self._guide is None else self._guide.num_allowed(draft_ids)
