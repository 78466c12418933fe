"""Text completions as clients read them: one object, or chunks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from openbook.engine.events import TokenLogprob
from openbook.server.errors import ApiError
from openbook.server.generation import Choice, ChoiceEvent, Generation
from openbook.server.logprobs import completion_logprobs, prompt_logprobs
from openbook.server.schema_completions import CompletionRequest
from openbook.server.served_model import Target
from openbook.server.streaming import DONE, sse


class CompletionReply:
    """What a request is answered with.

    Args:
        body: what was asked.
        target: of whom.
        generation: what is said.
    """

    def __init__(self, body: CompletionRequest, target: Target, generation: Generation) -> None:
        self.body, self.generation, self._target = body, generation, target
        self._created_s = int(time.time())
        self._prompts: dict[int, str] = {}

    def head(self) -> dict[str, Any]:
        """What stands in the object, and in every chunk."""
        return {
            "id": self.generation.requests[0].id.rpartition("-")[0],
            "object": "text_completion",
            "created": self._created_s,
            "model": self._target.name,
            "system_fingerprint": self._target.model.fingerprint,
        }

    def prompt(self, choice: Choice) -> str:
        """The text that is repeated before a choice; "" without echo."""
        if not self.body.echo:
            return ""
        key = id(choice.request)
        if key not in self._prompts:
            tokenizer = self._target.model.tokenizer
            ids = choice.request.prompt_ids
            num_start = len(tokenizer.start_ids) if tuple(ids[: len(tokenizer.start_ids)]) == tokenizer.start_ids else 0
            self._prompts[key] = tokenizer.decode(list(ids[num_start:]))
        return self._prompts[key]

    def ending(self, choice: Choice) -> dict[str, Any]:
        """What a choice has at its end: the reason, and its receipt if one was asked for."""
        receipt = {} if choice.receipt is None else {"receipt": choice.receipt}
        return {"finish_reason": "length" if self.is_empty else choice.finish_reason, **receipt}

    @property
    def is_empty(self) -> bool:
        """Whether only the prompt is wanted: the one token that was generated is left out."""
        return self.body.max_tokens == 0

    def usage(self) -> dict[str, Any]:
        """The token counts; what is left out counts as generated."""
        return self.generation.usage.to_openai()

    def logprobs(self, choice: Choice, start: int, offset: int) -> dict[str, Any] | None:
        """Those of a choice's tokens from `start` on, if they are asked for; `offset`: characters before them."""
        if self.body.logprobs is None:
            return None
        texts, ids = self._target.model.token_texts, choice.token_ids[start:]
        return completion_logprobs(texts, ids, choice.logprobs[start:], offset)

    def completion(self) -> dict[str, Any]:
        """The one object, when everything is said."""
        choices = [self._choice(choice) for choice in self.generation.choices]
        return {**self.head(), "choices": choices, "usage": self.usage()}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        value: dict[str, Any] = {
            "index": choice.index,
            "text": self.prompt(choice) + ("" if self.is_empty else choice.text),
            "logprobs": self._echoed_logprobs(choice) if self.body.echo else self.logprobs(choice, 0, 0),
            **self.ending(choice),
        }
        if self.body.prompt_logprobs is not None:
            texts = self._target.model.token_texts
            value["prompt_logprobs"] = prompt_logprobs(texts, choice.prompt_logprobs or [])
        return value

    def _echoed_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """Those of prompt and answer together."""
        if self.body.logprobs is None:
            return None
        ids = list(choice.request.prompt_ids)
        found: list[TokenLogprob | None] = [None, *(choice.prompt_logprobs or [])]
        if not self.is_empty:
            ids += choice.token_ids
            found += choice.logprobs
        return completion_logprobs(self._target.model.token_texts, ids, found, 0)


class CompletionChunks:
    """The events of a streamed text completion; see `EventEncoder`."""

    def __init__(self, reply: CompletionReply) -> None:
        options = reply.body.stream_options
        self._reply = reply
        self._has_usage = bool(options and options.include_usage)
        self._head = reply.head()
        if self._has_usage:
            self._head["usage"] = None
        self._sent: dict[int, tuple[int, int]] = {}  # of each choice: tokens and characters

    def begin(self) -> Iterator[bytes]:
        """Each choice's prompt, with echo."""
        for choice in self._reply.generation.choices:
            if prompt := self._reply.prompt(choice):
                yield self._chunk(choice, prompt, None)

    def event(self, event: ChoiceEvent) -> Iterator[bytes]:
        """New text with its tokens, and the end."""
        choice, is_empty = event.choice, self._reply.is_empty
        text = "" if is_empty else "".join(piece.text for piece in event.event.pieces)
        if not text and choice.finish_reason is None:
            return
        num_tokens, offset = self._sent.get(choice.index, (0, 0))
        logprobs = None if is_empty else self._reply.logprobs(choice, num_tokens, offset)
        self._sent[choice.index] = len(choice.token_ids), offset + len(text)
        yield self._chunk(choice, text, logprobs, self._reply.ending(choice) if choice.finish_reason else None)

    def end(self) -> Iterator[bytes]:
        """The usage, if it was asked for."""
        if self._has_usage:
            yield sse({**self._head, "choices": [], "usage": self._reply.usage()})
        yield DONE

    def error(self, error: ApiError) -> Iterator[bytes]:
        """The error as an event."""
        yield sse(error.body())
        yield DONE

    def _chunk(
        self, choice: Choice, text: str, logprobs: dict[str, Any] | None, ending: dict[str, Any] | None = None
    ) -> bytes:
        value = {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            **(ending or {"finish_reason": None}),
        }
        return sse({**self._head, "choices": [value]})
