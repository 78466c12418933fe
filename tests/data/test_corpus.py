from __future__ import annotations

import multiprocessing
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest

from openbook.core.errors import UserError
from openbook.core.seeding import TRAIN_SEED_START
from openbook.data import corpus
from openbook.data.corpus import Maker, sample_texts, write_stage_data
from openbook.data.mixture import Mixture, MixtureEntry
from openbook.data.pack import DataConfig
from openbook.data.record import Record
from openbook.data.shards import map_shard, read_manifest, read_records
from openbook.tasks.base import Problem
from openbook.tasks.registry import get_task
from openbook.tokenizer.chat import Chat

CONFIG = DataConfig(row_tokens=256, look_ahead=128, shard_rows=64)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def texts_by_document(folder: Path, chat: Chat) -> dict[int, str]:
    texts = {}
    for file in read_manifest(folder).shards:
        rows = map_shard(folder / file.path)
        for tokens, documents in zip(rows.tokens, rows.documents, strict=True):
            for number in set(documents.tolist()) - {-1}:
                texts[number] = chat.tokenizer.decode(tokens[documents == number].tolist())
    return texts


def test_same_bytes_on_each_run_and_for_any_number_of_workers(
    entries: list[MixtureEntry], chat: Chat, data_folder: Path, tmp_path: Path
) -> None:
    for name, num_workers in (("again", 1), ("two", 2)):
        write_stage_data(tmp_path / name, "main", entries, 700, 5, chat, CONFIG, num_workers)
        assert contents(tmp_path / name) == contents(data_folder)


def test_a_record_is_enough_to_make_its_document_again(data_folder: Path, chat: Chat) -> None:
    records, texts = read_records(data_folder), texts_by_document(data_folder, chat)
    assert len(records) == len(texts) == 700
    for number in range(0, 700, 70):
        record = records[number]
        assert (record["source"], record["generator"], record["license"]) == (
            *("reasoning-gym", "openbook.tasks", "Apache-2.0"),
        )
        assert record["version"] == "0.1.25"
        task = get_task(record["task"])
        problem = task.generate(record["seed"], record["difficulty"], **record.get("params", {}))
        work = task.work(problem)
        reasoning = work.reasoning(record["effort"])
        thinking = f"<think>{reasoning}</think>" if reasoning else ""
        expected = f"<|user|>{problem.question}<|assistant|><|{record['effort']}|>{thinking}{work.answer}<|end|>"
        assert texts[number] == expected


def test_manifest_counts_what_is_there(data_folder: Path, chat: Chat) -> None:
    manifest = read_manifest(data_folder)
    rows = [map_shard(data_folder / file.path) for file in manifest.shards]
    documents = np.concatenate([part.documents for part in rows])
    assert documents.shape == (manifest.rows, manifest.row_tokens)
    assert manifest.tokens == int((documents >= 0).sum()) == sum(manifest.tokens_by_task.values())
    assert manifest.trained_tokens == sum(int(part.loss_mask.sum()) for part in rows)
    assert manifest.padding_share == pytest.approx(1 - manifest.tokens / documents.size)
    assert manifest.padding_share <= 0.05
    assert sum(manifest.documents_by_task.values()) == manifest.documents == manifest.licenses["Apache-2.0"] == 700
    assert manifest.generators["reasoning-gym"] == "0.1.25"
    assert len(manifest.shards) > 1
    assert {file.path for file in manifest.files} == set(contents(data_folder)) - {"manifest.json"}


def test_published_problems_are_refused(
    entries: list[MixtureEntry], chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = Maker(mixture=Mixture(entries, 5), chat=chat, row_tokens=256)
    before = maker.make(0, 30)
    seed_of_7 = maker.mixture.problem_seed(7, 0)
    choice = maker.mixture.choose(7)
    published = get_task(choice.entry.task).generate(seed_of_7, choice.entry.difficulty, **choice.entry.params).question
    monkeypatch.setattr(corpus, "is_published", lambda question: question == published)
    after = maker.make(0, 30)
    assert after.refused["published"] == 1
    assert before.refused["published"] == 0
    assert [i for i in range(30) if before.records[i] != after.records[i]] == [7]
    assert f'"seed":{seed_of_7 + 1},'.encode() in after.records[7]


def test_documents_longer_than_a_row_are_replaced_and_counted(chat: Chat, tmp_path: Path) -> None:
    entries = [MixtureEntry(task="spell_backward")]
    lengths = Maker(mixture=Mixture(entries, 5), chat=chat, row_tokens=256).make(0, 100).lengths
    limit = int(np.median(lengths))
    config = DataConfig(row_tokens=limit)
    manifest = write_stage_data(tmp_path / "short", "short", entries, 100, 5, chat, config, num_workers=1)
    assert manifest.refused["too_long"] >= (lengths > limit).sum() > 0
    assert len(texts_by_document(tmp_path / "short", chat)) == 100


def test_a_hopeless_row_length_is_one_line_and_leaves_nothing(chat: Chat, tmp_path: Path) -> None:
    text = r"^task gcd \(easy, effort medium\): 32 problems in turn do not fit into a row .*: raise data.row_tokens, or"
    with pytest.raises(UserError, match=text):
        write_stage_data(
            tmp_path / "x", "x", [MixtureEntry(task="gcd")], 10, 5, chat, DataConfig(row_tokens=8), num_workers=1
        )
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_task_or_parameter_is_one_line(chat: Chat, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^unknown task 'gdc': did you mean 'gcd'\? "):
        write_stage_data(tmp_path / "x", "x", [MixtureEntry(task="gdc")], 10, 5, chat, CONFIG, num_workers=2)
    wrong = MixtureEntry(task="gcd", params={"max_numbre": 3})
    with pytest.raises(UserError, match=r"^task gcd with max_numbre=3: "):
        write_stage_data(tmp_path / "x", "x", [wrong], 10, 5, chat, CONFIG, num_workers=2)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told(entries: list[MixtureEntry], chat: Chat, tmp_path: Path) -> None:
    told: list[int] = []
    write_stage_data(tmp_path / "x", "x", entries, 300, 5, chat, CONFIG, 1, progress_callback=told.append)
    assert told == [256, 300]


def test_no_training_text_is_a_published_one(entries: list[MixtureEntry], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def refuse_short(question: str) -> bool:
        seen.append(question)
        return len(question) % 2 == 0

    monkeypatch.setattr(corpus, "is_published", refuse_short)
    texts = sample_texts(entries, 20, seed=1)
    assert sorted(texts) == ["chain_sum", "gcd", "spell_backward"]
    assert all(len(documents) == 20 for documents in texts.values())
    for document in (document for documents in texts.values() for document in documents):
        assert len(document.removeprefix("<|user|>").partition("<|assistant|>")[0]) % 2 == 1
    assert len(seen) > 60


def test_worked_solutions_that_fail_are_not_hidden(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(problem: Problem) -> None:
        raise ArithmeticError(problem.question)

    monkeypatch.setattr(get_task("gcd"), "work", fail)
    maker = Maker(mixture=Mixture([MixtureEntry(task="gcd")], 5), chat=chat, row_tokens=256)
    with pytest.raises(ArithmeticError):
        maker.make(0, 1)


def test_a_killed_worker_is_one_line_and_leaves_nothing(chat: Chat, tmp_path: Path) -> None:
    def kill_a_worker(num_documents: int) -> None:
        multiprocessing.active_children()[0].kill()

    with pytest.raises(
        UserError, match=r"^a process that makes data ended early: give it more memory or fewer --workers; a Python"
    ):
        write_stage_data(
            tmp_path / "x", "x", [MixtureEntry(task="spell_backward")], 20_000, 5, chat, DataConfig(), 2, kill_a_worker
        )
    assert list(tmp_path.iterdir()) == []


def test_conversations_begin_with_answered_questions_that_are_trained_on_too(chat: Chat) -> None:
    entries = [MixtureEntry(task="spell_backward")]
    maker = Maker(mixture=Mixture(entries, 5, history_share=0.5), chat=chat, row_tokens=256)
    chunk = maker.make(0, 200)
    records = [msgspec.json.decode(record, type=Record) for record in chunk.records]
    turns = Counter(len(record.history) for record in records)
    assert 70 < turns[1] + turns[2] < 130
    assert turns[2] > 10
    seeds = [seed for record in records for seed in (record.seed, *(seed for _, seed in record.history))]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= TRAIN_SEED_START
    end, user = (chat.tokenizer.special_id(name) for name in ("<|end|>", "<|user|>"))
    start = 0
    for record, length in zip(records, chunk.lengths.tolist(), strict=True):
        ids, mask = chunk.ids[start : start + length], chunk.loss_mask[start : start + length]
        assert (ids == user).sum() == 1 + len(record.history)
        assert mask[ids == end].sum() == 1 + len(record.history)
        assert not mask[ids == user].any()
        start += length


def test_a_conversation_that_does_not_fit_gives_up_its_history(chat: Chat) -> None:
    alone = Maker(mixture=Mixture([MixtureEntry(task="spell_backward")], 5), chat=chat, row_tokens=256)
    longest = int(alone.make(0, 300).lengths.max())
    mixture = Mixture([MixtureEntry(task="spell_backward")], 5, history_share=1.0)
    chunk = Maker(mixture=mixture, chat=chat, row_tokens=longest).make(0, 50)
    assert chunk.lengths.max() <= longest
    assert chunk.refused["too_long"] > 0
