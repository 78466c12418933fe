"""Make documents on all cores, the same bytes whatever their number, and write them as a stage's data."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from openbook.core.errors import UserError
from openbook.core.files import atomic_directory, sha256_bytes, write_json
from openbook.core.seeding import derive_seed
from openbook.data.mixture import NUM_ATTEMPTS, Choice, Mixture, MixtureEntry
from openbook.data.pack import DataConfig, Document, pack, to_arrays
from openbook.data.record import GENERATOR, LICENSE, SOURCE, Record, installed_version
from openbook.data.shards import (
    FORMAT,
    MANIFEST_FILE,
    RECORDS_FILE,
    DataFile,
    Manifest,
    data_file,
    shard_name,
    write_shard,
)
from openbook.tasks.base import Problem
from openbook.tasks.published import is_published
from openbook.tasks.registry import get_task
from openbook.tokenizer.chat import Chat

# Documents that a worker makes at a time: enough to pay for the way there and back.
_CHUNK_DOCUMENTS = 256
_CHUNKS_IN_FLIGHT = 4  # for each worker


class Chunk(NamedTuple):
    """Documents of contiguous indices, as they come from a worker.

    ids: uint16 or uint32, all documents one after the other. loss_mask: uint8, likewise. lengths: int64 [documents].
    records: one JSON line for each document. tasks: name for each document. refused: reasons, counted.
    """

    start: int
    ids: NDArray[np.generic]
    loss_mask: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    records: list[bytes]
    tasks: list[str]
    refused: Counter[str]


@dataclass(frozen=True, kw_only=True)
class Maker:
    """Makes any stretch of a stage's documents, in any process."""

    mixture: Mixture
    chat: Chat
    row_tokens: int
    version: str = field(default_factory=lambda: installed_version(SOURCE))

    def make(self, start: int, stop: int) -> Chunk:
        """Documents `start` to `stop` - 1."""
        refused: Counter[str] = Counter()
        drafts = {index: _draw(self.mixture, index, 0, refused) for index in range(start, stop)}
        encoded: dict[int, tuple[list[int], list[int]]] = {}
        open_indices = list(drafts)
        while open_indices:
            conversations = [(drafts[index].messages, drafts[index].choice.effort) for index in open_indices]
            encoded.update(zip(open_indices, self.chat.encode_many(conversations), strict=True))
            open_indices = [index for index in open_indices if len(encoded[index][0]) > self.row_tokens]
            for index in open_indices:
                refused["too_long"] += 1
                drafts[index] = _draw(self.mixture, index, drafts[index].attempt + 1, refused)
        documents = [encoded[index] for index in range(start, stop)]
        return Chunk(
            start=start,
            ids=np.array([i for ids, _ in documents for i in ids], id_dtype(self.chat)),
            loss_mask=np.array([m for _, mask in documents for m in mask], np.uint8),
            lengths=np.array([len(ids) for ids, _ in documents], np.int64),
            records=[msgspec.json.encode(self._record(drafts[index])) for index in range(start, stop)],
            tasks=[drafts[index].problem.task for index in range(start, stop)],
            refused=refused,
        )

    def _record(self, draft: _Draft) -> Record:
        return Record(
            source=SOURCE,
            version=self.version,
            generator=GENERATOR,
            license=LICENSE,
            task=draft.problem.task,
            difficulty=draft.problem.difficulty,
            effort=draft.choice.effort,
            seed=draft.problem.seed,
            params=draft.choice.entry.params,
            history=draft.history,
        )


class _Draft(NamedTuple):
    choice: Choice
    attempt: int
    problem: Problem
    history: list[tuple[str, int]]
    messages: list[dict[str, str]]


def _draw(mixture: Mixture, index: int, attempt: int, refused: Counter[str]) -> _Draft:
    """Document `index` from the first of its seeds, `attempt` or later, whose problem is in no published test set."""
    choice = mixture.choose(index)
    task = get_task(choice.entry.task)
    for number in range(attempt, NUM_ATTEMPTS):
        seed = mixture.problem_seed(index, number)
        problem = task.generate(seed, choice.entry.difficulty, **choice.entry.params)
        if is_published(problem.question):
            refused["published"] += 1
            continue
        work = task.work(problem)
        history, messages = _answered_questions(mixture.history(index, number))
        messages += [
            {"role": "user", "content": problem.question},
            {"role": "assistant", "content": work.answer, "reasoning_content": work.reasoning(choice.effort)},
        ]
        return _Draft(choice, number, problem, history, messages)
    raise UserError(
        f"task {choice.entry.task} ({choice.entry.difficulty}, effort {choice.effort}): {NUM_ATTEMPTS} problems in "
        "turn do not fit into a row or are published: raise data.row_tokens, or give params that make smaller problems"
    )


def _answered_questions(
    questions: Iterable[tuple[MixtureEntry, int]],
) -> tuple[list[tuple[str, int]], list[dict[str, str]]]:
    """Task and seed, and the messages, of the questions that are in no published test set."""
    history, messages = [], []
    for entry, seed in questions:
        task = get_task(entry.task)
        problem = task.generate(seed, entry.difficulty, **entry.params)
        if not is_published(problem.question):
            history.append((entry.task, seed))
            messages.append({"role": "user", "content": problem.question})
            messages.append({"role": "assistant", "content": task.work(problem).answer})
    return history, messages


def id_dtype(chat: Chat) -> type[np.generic]:
    """The smallest unsigned type that holds every token id."""
    return np.uint16 if chat.tokenizer.vocab_size <= 2**16 else np.uint32


def generate(maker: Maker, num_documents: int, num_workers: int) -> Iterator[Chunk]:
    """Documents 0 to `num_documents` - 1 in order, made by `num_workers` processes (1: this one).

    Raises:
        UserError: a task refuses its parameters, or a worker was killed.
    """
    ranges = [
        (start, min(start + _CHUNK_DOCUMENTS, num_documents)) for start in range(0, num_documents, _CHUNK_DOCUMENTS)
    ]
    if num_workers <= 1:
        yield from (maker.make(*bounds) for bounds in ranges)
        return
    # Processes are spawned, not forked: a fork of a process with threads (torch) may hang.
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker, (maker,))
    flying: deque[Future[Chunk]] = deque()
    try:
        for bounds in ranges:
            flying.append(pool.submit(_make, *bounds))
            if len(flying) >= num_workers * _CHUNKS_IN_FLIGHT:
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that makes data ended early: give it more memory or fewer --workers; a Python script that "
            'builds must do so under `if __name__ == "__main__":`'
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def write_stage_data(
    folder: Path,
    stage_name: str,
    mixture_entries: Sequence[MixtureEntry],
    num_documents: int,
    seed: int,
    chat: Chat,
    data_config: DataConfig,
    num_workers: int,
    progress_callback: Callable[[int], None] | None = None,
) -> Manifest:
    """Make a stage's documents, pack them and write shards, records and manifest to `folder`, whole or not at all.

    Args:
        seed: of the stage; with the entries it decides every document.
        num_workers: processes; the bytes are the same for any number.
        progress_callback: is told how many documents are made.

    Raises:
        UserError: a task or its parameters are wrong, documents do not fit into a row, or the disk is full.
    """
    for entry in mixture_entries:
        get_task(entry.task)
    mixture = Mixture(mixture_entries, seed, data_config.history_share)
    maker = Maker(mixture=mixture, chat=chat, row_tokens=data_config.row_tokens)
    tally = _Tally()
    with atomic_directory(folder) as partial:
        with (partial / RECORDS_FILE).open("wb") as records:
            documents = _documents(generate(maker, num_documents, num_workers), records.write, tally, progress_callback)
            files = list(_write_rows(partial, documents, chat, data_config))
        files.append(data_file(partial / RECORDS_FILE))
        num_rows = sum(file.rows for file in files)
        num_tokens = sum(tally.tokens_by_task.values())
        manifest = Manifest(
            format=FORMAT,
            stage=stage_name,
            seed=seed,
            mixture=[msgspec.to_builtins(entry) for entry in mixture_entries],
            documents=num_documents,
            rows=num_rows,
            row_tokens=data_config.row_tokens,
            tokens=num_tokens,
            trained_tokens=tally.trained_tokens,
            padding_share=1.0 - num_tokens / (num_rows * data_config.row_tokens),
            documents_by_task=dict(sorted(tally.documents_by_task.items())),
            tokens_by_task=dict(sorted(tally.tokens_by_task.items())),
            refused={reason: tally.refused[reason] for reason in ("published", "too_long")},
            generators={SOURCE: maker.version, GENERATOR: installed_version("openbook")},
            licenses={LICENSE: num_documents},
            tokenizer_sha256=sha256_bytes(chat.tokenizer.definition.encode()),
            files=files,
        )
        write_json(partial / MANIFEST_FILE, manifest)
    return manifest


def sample_texts(mixture_entries: Iterable[MixtureEntry], samples_per_task: int, seed: int) -> dict[str, list[str]]:
    """Documents of each task as text, parts set apart by control tokens: what `train_tokenizer` wants.

    Raises:
        UserError: a task or its parameters are wrong.
    """
    entries_of: dict[str, list[MixtureEntry]] = {}
    for entry in mixture_entries:
        entries_of.setdefault(entry.task, []).append(entry)
    texts = {}
    for task, entries in sorted(entries_of.items()):
        mixture = Mixture(entries, derive_seed(seed, "tokenizer", task))
        drafts = (_draw(mixture, index, 0, Counter()) for index in range(samples_per_task))
        texts[task] = [
            f"<|user|>{question['content']}<|assistant|><think>{spoken['reasoning_content']}</think>{spoken['content']}"
            for question, spoken in (draft.messages for draft in drafts)
        ]
    return texts


@dataclass
class _Tally:
    documents_by_task: Counter[str] = field(default_factory=Counter)
    tokens_by_task: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    trained_tokens: int = 0


def _documents(
    chunks: Iterable[Chunk],
    write_records: Callable[[bytes], Any],
    tally: _Tally,
    progress_callback: Callable[[int], None] | None,
) -> Iterator[Document]:
    """The chunks' documents one by one; their records are written and everything is counted on the way."""
    for chunk in chunks:
        write_records(b"".join(record + b"\n" for record in chunk.records))
        tally.refused.update(chunk.refused)
        tally.trained_tokens += int(chunk.loss_mask.sum())
        ends = np.cumsum(chunk.lengths).tolist()
        for number, (start, end, task) in enumerate(zip([0, *ends], ends, chunk.tasks, strict=False)):
            tally.documents_by_task[task] += 1
            tally.tokens_by_task[task] += end - start
            yield Document(chunk.start + number, chunk.ids[start:end], chunk.loss_mask[start:end])
        if progress_callback:
            progress_callback(chunk.start + len(chunk.tasks))


def _write_rows(folder: Path, documents: Iterable[Document], chat: Chat, config: DataConfig) -> Iterator[DataFile]:
    packed = pack(documents, config.row_tokens, config.look_ahead)
    for number in count():
        rows = list(islice(packed, config.shard_rows))
        if not rows:
            return
        arrays = to_arrays(rows, config.row_tokens, chat.tokenizer.pad_id, id_dtype(chat))
        yield write_shard(folder / shard_name(number), arrays)


_maker: Maker | None = None


def _start_worker(maker: Maker) -> None:
    """Run once in each new process, which has one core to itself."""
    global _maker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _maker = maker


def _make(start: int, stop: int) -> Chunk:
    assert _maker is not None
    return _maker.make(start, stop)
