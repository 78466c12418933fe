"""From a request to its sequences: what reads their tokens, what steers them, and whether they are possible at all."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from openbook.core.errors import UserError
from openbook.engine.next_token import TokenChooser
from openbook.engine.request import Request
from openbook.engine.sequence import Sequence
from openbook.engine.transcript import Transcript
from openbook.tokenizer.chat import Chat
from openbook.tokenizer.marks import ChatFormat, detect_format
from openbook.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from openbook.engine.answer_guide import AnswerGuide
    from openbook.engine.structured import GrammarCompiler


class SequenceFactory:
    """Makes the sequences of one model.

    Args:
        chat: renders conversations, and holds the tokenizer; of a base model the tokenizer alone.
        vocab_size: number of logits.
    """

    def __init__(self, chat: Chat | Tokenizer, vocab_size: int) -> None:
        self._tokenizer = chat.tokenizer if isinstance(chat, Chat) else chat
        self._format: ChatFormat = (
            chat.format if isinstance(chat, Chat) else detect_format(self._tokenizer.control_tokens, "")
        )
        self._vocab_size = vocab_size

    def make(self, request: Request, limit: int, index: int = 0) -> Sequence:
        """Sample `index` of a request, of at most `limit` new tokens.

        Raises:
            UserError: a token id is not in the vocabulary, or a constraint is wrong.
        """
        params = request.params
        given = {"prompt": request.prompt_ids, "stop_token_ids": params.stop_ids}
        given["logit_bias"] = [token_id for token_id, _ in params.logit_bias]
        for name, ids in given.items():
            if ids and not 0 <= min(ids) <= max(ids) < self._vocab_size:
                raise UserError(
                    f"{name} has token ids from {min(ids)} to {max(ids)}: expected 0 to {self._vocab_size - 1}; "
                    "use this model's tokenizer"
                )
        transcript = Transcript(
            self._tokenizer,
            params.stop,
            chat_format=self._format,
            prompt_ids=request.prompt_ids,
            tool_names=request.tool_names,
            stop_ids=params.stop_ids,
            ignores_own_stops=params.ignore_eos,
            is_text=request.is_text,
        )
        return Sequence(
            request=request,
            index=index,
            limit=limit,
            transcript=transcript,
            chooser=TokenChooser(request, index, self._guide(request)),
        )

    def _guide(self, request: Request) -> AnswerGuide | None:
        params = request.params
        if params.constraint is None and params.thinking_budget is None:
            return None
        from openbook.engine.answer_guide import AnswerGuide

        chat_format = ChatFormat() if request.is_text else self._format
        grammar = None
        if params.constraint is not None:
            grammar = self._compiler.compile(params.constraint, is_text=request.is_text)
        return AnswerGuide(self._tokenizer, chat_format, request.prompt_ids, params.thinking_budget, grammar)

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        from openbook.engine.structured import GrammarCompiler

        return GrammarCompiler(self._tokenizer, self._vocab_size, self._format)
