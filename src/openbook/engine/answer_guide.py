"""What may come next in one sequence: free thinking within its budget, then an answer that obeys its grammar."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from openbook.core.errors import UserError
from openbook.engine.structured import GrammarState
from openbook.engine.thinking import ThinkingTracker
from openbook.tokenizer.marks import ChatFormat, ThinkingMarks
from openbook.tokenizer.tokenizer import Tokenizer


class AnswerGuide:
    """Follows one sequence; nothing of it is drawn here, and the same tokens always guide alike.

    Until the answer begins, the tokens that open the thinking are allowed beside those that the grammar allows.

    Args:
        tokenizer: the model's.
        chat_format: how it marks its thinking.
        prompt_ids: what it was given.
        thinking_budget: most tokens of thinking; None is no limit.
        grammar: what the answer obeys, at its beginning; None leaves it free.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_format: ChatFormat,
        prompt_ids: Sequence[int],
        thinking_budget: int | None = None,
        grammar: GrammarState | None = None,
    ) -> None:
        harmony = chat_format.harmony
        self._thinking = ThinkingTracker(
            tokenizer,
            chat_format,
            prompt_ids,
            thinking_budget,
            # A grammar that allows a channel's mark at once is one of calls, which have headers of their own.
            has_call_headers=bool(harmony and grammar and grammar.allows(tokenizer.control_tokens[harmony.channel])),
        )
        self._grammar, self._fits = grammar, True  # do the tokens since the answer could have begun fit it?
        self._forced = self._thinking.closing_ids()  # at the start, where the prompt opens thinking that has no budget
        barred = set(grammar.compiler.stop_ids) if grammar else set()
        if grammar and harmony:  # the end of the message is all that may steer
            barred = set(tokenizer.control_tokens.values()) - {tokenizer.control_tokens[harmony.end]}
        self._num_known = tokenizer.vocab_size  # the logits behind have no token
        self._barred_in_thinking = np.array(sorted(barred), dtype=np.int64)

    @property
    def num_thinking_tokens(self) -> int:
        """Tokens of thinking so far."""
        return self._thinking.num_thinking_tokens

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete and nothing can follow: the sequence may end without its stop token."""
        return self._grammar is not None and self._thinking.is_answering and self._fits and self._grammar.is_finished

    def masked(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits float32 [V] with minus infinity where a token may not come next; themselves if all may.

        Raises:
            UserError: no token can follow, or the grammar has become too complex to go on.
        """
        if self._forced:
            return _only(logits, self._forced[:1])
        if self._grammar is None:
            return logits
        thinking = self._thinking
        openings = thinking.opening_ids()
        if not thinking.is_thinking and not (thinking.is_answering and self._fits):
            return _only(logits, [*openings, *thinking.answer_ids()])
        if thinking.is_thinking:
            masked = logits.copy()
            masked[self._barred_in_thinking] = -np.inf
            masked[self._num_known :] = -np.inf
        else:
            masked = self._grammar.masked(logits)
        if thinking.text_marks is not None:
            masked[self._ids_that_skip_ahead(thinking.text_marks, self._grammar)] = -np.inf
        masked[openings] = logits[openings]
        return masked

    def push(self, token_id: int) -> list[int]:
        """Take the sequence's next token into account; the tokens that must follow it, to be pushed too.

        Raises:
            UserError: the grammar does not allow the token, or has become too complex to go on.
        """
        thinking, grammar = self._thinking, self._grammar
        forced, self._forced = self._forced, []
        if forced:
            thinking.push(token_id)
            return forced[1:]
        was_thinking, is_part = thinking.is_thinking, thinking.is_answering
        may_open = token_id in thinking.opening_ids()
        thinking.push(token_id)
        if thinking.is_thinking:
            if grammar is not None and not was_thinking:
                grammar.reset()
                self._fits = True
            return thinking.closing_ids()
        if grammar is not None and is_part and self._fits:
            self._fits = grammar.accept(token_id)
            if not self._fits and not may_open:
                raise UserError(f"token {token_id} does not obey the answer's constraint: take those that it allows")
        return []

    def num_allowed(self, draft_ids: Sequence[int]) -> int:
        """How many of these guesses at the next tokens are worth computing: the others would not be allowed."""
        if self._forced:
            return 0
        if self._grammar is None or not self._thinking.is_answering or self._thinking.opening_ids():
            return len(draft_ids)
        return self._grammar.validate(draft_ids)

    def _ids_that_skip_ahead(self, marks: ThinkingMarks, grammar: GrammarState) -> NDArray[np.int64]:
        """Where the marks are text: tokens that close the thinking and go on, or that open it amid the answer.

        No grammar sees what stands in one token with a mark.
        """
        begun, is_thinking = self._thinking.begun_mark, self._thinking.is_thinking
        return grammar.compiler.ids_completing(begun, marks.close if is_thinking else marks.open, is_thinking)


def _only(logits: NDArray[np.float32], ids: list[int]) -> NDArray[np.float32]:
    masked = np.full_like(logits, -np.inf)
    masked[ids] = logits[ids]
    return masked
