"""The model that ships inside the package: what its card says is so, and it gives the same tokens wherever it runs."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import openbook
from openbook.checkpoint.locate import locate
from openbook.cli.main import main
from openbook.core.files import sha256_file
from openbook.core.progress import format_duration
from openbook.engine.model import Model
from openbook.engine.request import SamplingParams
from openbook.evals.harness import score
from openbook.evals.prompts import extract_answer
from openbook.release.card import percent
from openbook.release.facts import read_scores
from openbook.tasks.base import EFFORTS, Effort
from openbook.tasks.registry import get_task
from openbook.train.ledger import read_ledger
from openbook.train.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 8_000_000
FRESH_SEED = 123_000_000  # neither in the release's own evaluation nor in training
NUM_PROMPTS = 20


@pytest.fixture(scope="module")
def release() -> Path:
    return locate("nano")


@pytest.fixture(scope="module")
def nano(release: Path) -> Model:
    return openbook.load("nano")


@pytest.fixture(scope="module")
def in_transformers(release: Path) -> tuple[Any, Any]:
    """Tokenizer and model of the release as Transformers loads them."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ[name] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(release), AutoModelForCausalLM.from_pretrained(release)


def nano_tasks() -> list[str]:
    """Names of the tasks in the recipe."""
    return load_recipe(ROOT / "recipes" / "nano.toml").eval.tasks


@cache
def prompts() -> list[tuple[str, Effort]]:
    """Fresh problems of every task in turn, one effort after another; their lengths are unlike."""
    tasks = nano_tasks()
    return [
        (get_task(tasks[index % len(tasks)]).generate(FRESH_SEED + index).question, EFFORTS[index % len(EFFORTS)])
        for index in range(NUM_PROMPTS)
    ]


def test_the_release_is_whole_and_small(release: Path) -> None:
    result = openbook.verify("nano")
    assert result.verdict == "INTEGRITY", result.differences
    assert sum(file.stat().st_size for file in release.rglob("*") if file.is_file()) <= MAX_BYTES


def test_it_was_made_by_the_recipe_in_the_repository(release: Path) -> None:
    stored = release / "provenance" / "recipe.toml"
    assert stored.read_bytes() == (ROOT / "recipes" / "nano.toml").read_bytes()
    assert openbook.verify(release).recipe_sha256 == load_recipe(ROOT / "recipes" / "nano.toml").hash


def test_at_least_five_tasks_at_95_percent_on_fresh_seeds(nano: Model) -> None:
    report = openbook.evaluate(nano, "nano", seed=FRESH_SEED, samples=60)
    accuracies = {task: totals.accuracy for task, totals in report.by_task.items()}
    assert sum(accuracy >= 0.95 for accuracy in accuracies.values()) >= 5, accuracies


def test_greedy_decoding_in_transformers_gives_the_same_tokens(nano: Model, in_transformers: tuple[Any, Any]) -> None:
    tokenizer, model = in_transformers
    for question, effort in prompts():
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            reasoning_effort=effort,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            output = model.generate(**inputs)[0].tolist()
        num_prompt = inputs["input_ids"].shape[1]
        assert output[:num_prompt] == nano.prompt_ids(question, effort=effort)
        assert output[num_prompt:] == nano.chat(question, effort=effort).token_ids, question


@pytest.mark.parametrize("effort", EFFORTS)
def test_the_chat_template_renders_the_same_ids(effort: Effort, nano: Model, in_transformers: tuple[Any, Any]) -> None:
    conversation = [
        {"role": "user", "content": "What is 2 + 2 = ?"},
        {"role": "assistant", "content": "4", "reasoning_content": "2+2=4"},
        {"role": "user", "content": "Wörter, 漢字 and 3 * 4"},
    ]
    system = [{"role": "system", "content": "Be brief."}]
    for messages in (conversation[:1], conversation, system + conversation):
        theirs = in_transformers[0].apply_chat_template(
            messages, reasoning_effort=effort, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert theirs == nano.prompt_ids(messages, effort=effort)


def test_a_batch_answers_as_one_by_one(nano: Model) -> None:
    questions = [question for question, _ in prompts()]
    assert len({len(nano.prompt_ids(question)) for question in questions}) > 5
    batch = nano.generate_batch(questions, params=[SamplingParams()] * NUM_PROMPTS)
    for question, answer in zip(questions, batch, strict=True):
        assert answer.token_ids == nano.chat(question).token_ids, question


def test_the_card_states_the_scores_in_provenance(release: Path) -> None:
    card = (release / "README.md").read_text()
    table = [line for line in card.splitlines() if re.match(r"\| \w+ \| (easy|hard) \|", line)]
    scores = read_scores(release / "provenance" / "evals")
    assert len(scores) == len(nano_tasks()) * len(load_recipe(release / "provenance" / "recipe.toml").eval.efforts)
    assert table == [
        f"| {s.task} | {s.difficulty} | {s.effort} | {percent(s.accuracy)} | {percent(s.low)} to {percent(s.high)} "
        f"| {s.mean_score:.3f} | {s.samples} | {s.seed} | {s.mean_tokens:.0f} |"
        for s in scores
    ]


def test_the_card_states_the_facts_in_provenance(release: Path) -> None:
    card = (release / "README.md").read_text()
    provenance = release / "provenance"
    run = json.loads((provenance / "environment.json").read_text())
    entries = read_ledger(provenance / "trace.jsonl")
    stages = json.loads((provenance / "data.json").read_text())["stages"]
    assert f"model of {openbook.verify(release).num_parameters:,} parameters" in card
    for label, value in {
        "recipe": openbook.verify(release).recipe_sha256,
        "model.safetensors": sha256_file(release / "model.safetensors"),
        "steps": f"{len(entries):,}",
        "tokens read": f"{sum(entry.tokens for entry in entries):,}",
        "threads": str(run["threads"]),
        "machine": run["machine"],
        "time": format_duration(run["seconds"]),
    }.items():
        assert f"| {label} | {value} |" in card
    for stage in stages:
        row = f"| {stage['stage']} | {stage['documents']:,} | {stage['tokens']:,} | {percent(stage['padding_share'])} |"
        assert row in card
        assert stage["manifest_sha256"][:12] in card
        assert stage["padding_share"] <= 0.05
    for task in nano_tasks():
        documents = sum(stage["documents_by_task"].get(task, 0) for stage in stages)
        assert f"| {task} | {get_task(task).summary} | {documents:,} |" in card
    assert len(entries) == sum(stage.steps for stage in load_recipe(provenance / "recipe.toml").stages)


def test_the_scores_in_provenance_are_those_of_their_items(release: Path) -> None:
    """Each problem is made again from its seed and each reply is scored again."""
    folder = release / "provenance" / "evals" / "easy-medium"
    summary = json.loads((folder / "summary.json").read_text())["tasks"]
    assert sorted(summary) == sorted(nano_tasks())
    for task, figures in summary.items():
        items = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
        assert len(items) == figures["items"]
        for item in items:
            problem = get_task(task).generate(item["seed"])
            assert problem.question == item["problem"]
            assert item["score"] == score(problem, extract_answer(item.get("reply", item["answer"]), "bare"))
        assert figures["accuracy"] == sum(item["score"] >= 1.0 for item in items) / len(items)


def test_demo_shows_five_problems_and_three_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    assert "1. Check. nano: INTEGRITY" in printed
    assert printed.count("   scores  | ") == 5
    lines = printed.rstrip().splitlines()
    assert lines[-4] == "Now try:"
    assert [line.split()[:2] for line in lines[-3:]] == [["openbook", name] for name in ("chat", "tasks", "eval")]
