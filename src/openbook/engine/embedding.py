"""Embeddings of texts: computed between the engine's steps, one bounded piece at a time.

A text's embedding is the mean of its final hidden states, those that logits are made from. A piece holds several short
texts or a part of a long one, so that answers that are running wait for no more than a chunk of a prompt would cost
them. Keys and values live in a cache that goes with its texts: the engine's own blocks stay with the answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from openbook.core.errors import UserError
from openbook.engine.paged import BLOCK_TOKENS, PagedRunner, PagedStep


class EmbeddingJob:
    """The texts of one request.

    Args:
        prompts: token ids of each text.
        adapter: the adapter to compute with; None is the model as it is.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], adapter: str | None = None) -> None:
        self.prompts, self.adapter = prompts, adapter
        self.vectors: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(prompts)
        self.error: Exception | None = None
        self.on_end: Callable[[], None] = lambda: None  # called once, when all texts are done or one has failed
        self.num_begun = self.num_done = 0
        self.is_over = False

    @property
    def result(self) -> NDArray[np.float32] | None:
        """float32 [texts, hidden_size]; None of a job that failed."""
        return None if self.error is not None else np.stack(self.vectors)

    def add(self, index: int, vector: NDArray[np.float32]) -> None:
        """Text number `index` is done."""
        self.vectors[index] = vector
        self.num_done += 1
        if self.num_done == len(self.prompts):
            self._end()

    def fail(self, error: Exception) -> None:
        """One of its texts cannot be computed."""
        self.error = error
        self._end()

    def _end(self) -> None:
        if not self.is_over:
            self.is_over = True
            self.on_end()


class Embedder:
    """Computes jobs in turn, a text of each, so that a large one does not hold up the others.

    Args:
        runner: computes the hidden states.
        piece_tokens: most tokens of one piece.
    """

    def __init__(self, runner: PagedRunner, piece_tokens: int) -> None:
        self._runner, self._piece_tokens = runner, piece_tokens
        self._jobs: deque[EmbeddingJob] = deque()  # those with texts that are not begun
        self._batch: _Batch | None = None
        self._alone: deque[_Text] = deque()  # of a batch that failed: one of them is to blame
        self.num_tokens = 0  # computed since the start

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._batch or self._alone or self._jobs)

    def uses_adapter(self, name: str) -> bool:
        """Whether a job that has not ended asked for an adapter."""
        begun = [text.job for text in (*(self._batch.texts if self._batch else ()), *self._alone)]
        return any(job.adapter == name and not job.is_over for job in (*self._jobs, *begun))

    def add(self, job: EmbeddingJob) -> None:
        """Compute a job when its turn comes."""
        self._jobs.append(job)

    def drop(self, job: EmbeddingJob) -> None:
        """Compute no more of a job: nobody waits for it any longer."""
        job.is_over = True
        if job in self._jobs:
            self._jobs.remove(job)

    def step(self) -> None:
        """Compute one piece."""
        batch = self._batch or self._next_batch()
        self._batch = None
        if all(text.job.is_over for text in batch.texts):
            return
        try:
            self.num_tokens += batch.step(self._piece_tokens)
        except Exception as error:  # whatever a runner may throw: no job may take others with it
            if len(batch.texts) > 1:
                self._alone += batch.texts
            else:
                batch.texts[0].job.fail(error)
            return
        if not batch.is_done:
            self._batch = batch
            return
        for text, vector in zip(batch.texts, batch.means(), strict=True):
            text.job.add(text.index, vector)

    def _next_batch(self) -> _Batch:
        if self._alone:
            return _Batch(self._runner, [self._alone.popleft()])
        texts: list[_Text] = []
        room = self._piece_tokens
        while self._jobs and (not texts or len(self._jobs[0].prompts[self._jobs[0].num_begun]) <= room):
            job = self._jobs.popleft()
            text = _Text(job, job.num_begun)
            job.num_begun += 1
            if job.num_begun < len(job.prompts):
                self._jobs.append(job)
            texts.append(text)
            room -= len(text.ids)
        return _Batch(self._runner, texts)


class _Text:
    def __init__(self, job: EmbeddingJob, index: int) -> None:
        self.job, self.index, self.ids = job, index, job.prompts[index]


class _Batch:
    """Texts that are computed together: several that fit into one piece, or one of any length."""

    def __init__(self, runner: PagedRunner, texts: Sequence[_Text]) -> None:
        self.texts = texts
        counts = np.array([len(text.ids) for text in texts])
        num_blocks = -(-counts // BLOCK_TOKENS)
        width = int(num_blocks.max())
        firsts = np.cumsum(num_blocks) - num_blocks
        last = int(num_blocks.sum()) - 1
        self._tables = np.minimum(firsts[:, None] + np.arange(width), last).astype(np.int32)
        self._cache = runner.paged_cache(last + 1)
        self._ids = np.concatenate([np.asarray(text.ids, dtype=np.int32) for text in texts])
        self._sequences = np.repeat(np.arange(len(texts), dtype=np.int32), counts)
        ends = np.cumsum(counts)
        self._positions = (np.arange(ends[-1]) - np.repeat(ends - counts, counts)).astype(np.int32)
        self._counts, self._num_done = counts, 0
        self._sums: list[NDArray[np.float64] | None] = [None] * len(texts)

    @property
    def is_done(self) -> bool:
        """Whether all tokens are computed."""
        return self._num_done == len(self._ids)

    def step(self, piece_tokens: int) -> int:
        """Compute the next piece; how many tokens it has."""
        part = slice(self._num_done, self._num_done + piece_tokens)
        ids, sequences = self._ids[part], self._sequences[part]
        adapters = [text.job.adapter for text in self.texts]
        rows_MD = self._cache.hidden_states(
            PagedStep(
                token_ids=ids,
                positions=self._positions[part],
                sequences=sequences,
                block_tables=self._tables,
                wanted=np.arange(len(ids), dtype=np.int32),
                adapters=adapters if any(adapters) else (),
            )
        )
        counts = np.bincount(sequences, minlength=len(self.texts))
        for index, rows in enumerate(np.split(rows_MD, np.cumsum(counts)[:-1])):
            self._sums[index] = _add_rows(self._sums[index], rows)
        self._num_done += len(ids)
        return len(ids)

    def means(self) -> list[NDArray[np.float32]]:
        """Of each text, float32 [hidden_size]."""
        return [
            (total / count).astype(np.float32)
            for total, count in zip(self._sums, self._counts.tolist(), strict=True)
            if total is not None
        ]


def _add_rows(total: NDArray[np.float64] | None, rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Add rows to a sum one after the other, in double precision: however they are cut into pieces, the same bits."""
    wide = rows.astype(np.float64)
    if total is not None:
        wide[0] += total
    summed: NDArray[np.float64] = np.add.reduce(wide, axis=0)
    return summed


def require_embeddable(prompts: Sequence[Sequence[int]], max_model_len: int, vocab_size: int) -> None:
    """Refuse prompts that cannot be computed.

    Raises:
        UserError: there is none, one is empty or longer than the context, or a token id is unknown.
    """
    if not prompts:
        raise UserError("there is nothing to embed: give at least one text")
    for number, prompt in enumerate(prompts, 1):
        if not 1 <= len(prompt) <= max_model_len:
            raise UserError(
                f"text {number} has {len(prompt):,} tokens: expected 1 to {max_model_len:,}, the model's context; "
                + ("shorten it" if prompt else "give some text")
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(
                f"text {number} has token ids from {min(prompt)} to {max(prompt)}: expected 0 to {vocab_size - 1}; "
                "use this model's tokenizer"
            )
