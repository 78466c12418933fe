"""Put tasks to a model and score what it says."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from openbook.core.errors import UserError
from openbook.core.seeding import TRAIN_SEED_START, derive_seed
from openbook.engine.model import Answer, Model
from openbook.engine.request import SamplingParams
from openbook.evals.prompts import PromptStyle, conversation, default_style, extract_answer
from openbook.evals.report import Item, Report, Settings
from openbook.tasks.base import Difficulty, Effort, Problem
from openbook.tasks.registry import get_task


def evaluate(
    model: Model,
    tasks: Sequence[str],
    *,
    seed: int,
    samples: int,
    difficulty: Difficulty = "easy",
    effort: Effort = "medium",
    prompt_style: PromptStyle | None = None,
    temperature: float = 0.0,
    max_tokens: int | None = None,
    batch_size: int = 64,
    on_item: Callable[[int, int], None] | None = None,
) -> Report:
    """Score `model` on `samples` problems of each task; item i is the task's problem of seed + i.

    Args:
        model: any loaded model.
        tasks: names of tasks, each once.
        seed: of the first problem; with a temperature also of the random numbers.
        samples: problems a task, at least 1.
        difficulty: reasoning-gym's default configuration or the published hard one.
        effort: how much the model may think.
        prompt_style: "bare" or "answer-tags"; None picks by whether the model is one of ours.
        temperature: 0 is greedy.
        max_tokens: most tokens a reply, thinking included; None is up to the model's context.
        batch_size: problems decoded at a time; changes speed only.
        on_item: called with (problems done, problems correct) after every problem.

    A problem that does not fit into the model's context scores 0 and says so in its item.

    Raises:
        UserError: no task, an unknown one, no samples, or seeds that belong to training.
    """
    if not tasks:
        raise UserError("there is no task to evaluate: give a suite with at least one task")
    if samples < 1:
        raise UserError(f"samples is {samples}: expected 1 or more; correct that value")
    if seed < 0 or seed + samples > TRAIN_SEED_START:
        raise UserError(
            f"seeds {seed:,} to {seed + samples - 1:,} are not for evaluation: "
            f"from {TRAIN_SEED_START:,} on they belong to training; choose a smaller --seed"
        )
    began_s = time.monotonic()
    style = prompt_style or default_style(model)
    problems = [get_task(task).generate(seed + index, difficulty) for task in tasks for index in range(samples)]
    conversations = [conversation(problem.question, style) for problem in problems]
    num_prompt_tokens = [len(model.prompt_ids(messages, effort=effort)) for messages in conversations]
    params = [
        SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            seed=derive_seed(problem.seed, problem.task) if temperature else 0,
        )
        for problem in problems
    ]
    items: list[Item | None] = [None] * len(problems)
    num_done = num_correct = 0

    def finish(index: int, item: Item) -> None:
        nonlocal num_done, num_correct
        items[index] = item
        num_done += 1
        num_correct += item.score >= 1.0
        if on_item:
            on_item(num_done, num_correct)

    fitting: list[int] = []
    for index, (problem, num_tokens) in enumerate(zip(problems, num_prompt_tokens, strict=True)):
        if num_tokens < model.max_model_len:
            fitting.append(index)
        else:
            finish(index, _refused(problem, num_tokens, model.max_model_len))
    model.generate_batch(
        [conversations[index] for index in fitting],
        effort=effort,
        params=[params[index] for index in fitting],
        batch_size=batch_size,
        on_answer=lambda place, answer: finish(fitting[place], _item(problems[fitting[place]], answer, style)),
    )
    settings = Settings(
        model=model.name,
        tasks=list(tasks),
        difficulty=difficulty,
        seed=seed,
        samples=samples,
        effort=effort,
        prompt_style=style,
        temperature=temperature,
        max_tokens=max_tokens,
    )
    done = [item for item in items if item is not None]
    return Report(settings=settings, items=done, seconds=time.monotonic() - began_s)


def score(problem: Problem, answer: str | None) -> float:
    """Score of an extracted answer, 0.0 to 1.0; no answer scores 0.0."""
    if answer is None:
        return 0.0
    try:
        return get_task(problem.task).score(problem, answer)
    except Exception:
        # Several scorers parse with int(), Fraction() or json; text they choke on is a wrong answer, not a failed run.
        return 0.0


def _item(problem: Problem, answer: Answer, style: PromptStyle) -> Item:
    extracted = extract_answer(answer.text, style)
    return Item(
        task=problem.task,
        difficulty=problem.difficulty,
        seed=problem.seed,
        problem=problem.question,
        thinking=answer.reasoning,
        answer=extracted,
        reply=None if answer.text == extracted else answer.text,
        score=score(problem, extracted),
        prompt_tokens=answer.usage.prompt_tokens,
        tokens=answer.usage.completion_tokens,
        finish_reason=answer.finish_reason,
    )


def _refused(problem: Problem, num_tokens: int, max_model_len: int) -> Item:
    return Item(
        task=problem.task,
        difficulty=problem.difficulty,
        seed=problem.seed,
        problem=problem.question,
        thinking="",
        answer=None,
        score=0.0,
        prompt_tokens=num_tokens,
        tokens=0,
        finish_reason=None,
        error=f"the prompt has {num_tokens:,} tokens and the model's context is {max_model_len:,}",
    )
