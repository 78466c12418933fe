"""One running sample of a request: its tokens, its blocks, and what steers its next token."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from functools import cached_property

from openbook.engine.block_manager import block_digest
from openbook.engine.events import TokenLogprob
from openbook.engine.next_token import TokenChooser
from openbook.engine.paged import BLOCK_TOKENS, PromptImages
from openbook.engine.request import FinishReason, Request
from openbook.engine.transcript import Transcript


@dataclass(kw_only=True, eq=False)
class Sequence:
    """A sequence of a request.

    Args:
        request: whose.
        index: which of the request's samples it is.
        limit: most new tokens.
        transcript: turns its tokens into text.
        chooser: chooses its tokens.
        arrival: number of the request in the order of their coming.
        is_forked: whether the request's other samples have begun.
        draft_ids: guesses at its next tokens, which the coming step checks.
    """

    request: Request
    index: int
    limit: int
    transcript: Transcript
    chooser: TokenChooser
    arrival: int = 0
    is_forked: bool = False
    new_ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose keys and values are in the cache
    cached_tokens: int = 0  # of the prompt, found there
    draft_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)  # of the new tokens
    digests: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they were asked for

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)  # prompt and new tokens

    @property
    def num_tokens(self) -> int:
        """Of prompt and answer so far."""
        return len(self.token_ids)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_missing(self) -> int:
        """Tokens that are to be computed before the next one can be chosen; drafts not counted."""
        return self.num_tokens - self.num_computed

    @property
    def max_drafts(self) -> int:
        """Most drafts that can be of use: of the tokens that are left, a step brings one without any."""
        return self.limit - len(self.new_ids) - 1

    @property
    def indices(self) -> range:
        """The samples that end if it ends: until its prompt has been read, all of its request."""
        return range(self.index, self.index + 1 if self.is_forked else self.request.num_samples)

    @property
    def order(self) -> tuple[int, int, int]:
        """Who is served first: priority, then arrival."""
        return self.request.priority, self.arrival, self.index

    def append(self, token_id: int) -> None:
        """One more token of the answer."""
        self.token_ids.append(token_id)
        self.new_ids.append(token_id)
        self.counts[token_id] += 1

    @cached_property
    def images(self) -> PromptImages | None:
        """Those of its prompt, if it has any: one object, by which a runner knows them again."""
        request = self.request
        return PromptImages(prompt_ids=request.prompt_ids, images=request.images) if request.images else None

    @cached_property
    def _digest_seed(self) -> bytes:
        """What beside its tokens decides a sequence's keys and values: its adapter and its images."""
        images = [hashlib.blake2b(image.patches.tobytes()).hexdigest() for image in self.request.images]
        return repr((self.request.adapter, images)).encode()

    def full_digests(self) -> Tokens[bytes]:
        """The digests of all full blocks, which say what must be equal for keys and values to be."""
        while (len(self.digests) + 1) * BLOCK_TOKENS <= self.num_tokens:
            start = len(self.digests) * BLOCK_TOKENS
            parent = self.digests[-1] if self.digests else self._digest_seed
            self.digests.append(block_digest(parent, self.token_ids[start : start + BLOCK_TOKENS]))
        return self.digests
