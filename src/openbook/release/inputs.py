"""What training reads, made from the recipe: the tokenizer, and each stage's data."""

from __future__ import annotations

from pathlib import Path

from openbook.core.files import atomic_directory
from openbook.core.progress import Progress
from openbook.core.seeding import derive_seed
from openbook.data.corpus import sample_texts, write_stage_data
from openbook.tokenizer.chat import Chat, default_template
from openbook.tokenizer.train import train_tokenizer
from openbook.train.recipe import Recipe, StageConfig


def make_tokenizer(recipe: Recipe, out: Path) -> None:
    """Train the recipe's tokenizer and write it, with the chat template, into the new folder `out`.

    Raises:
        UserError: a task or its parameters are wrong, or the disk is full.
    """
    entries = [entry for stage in recipe.stages for entry in stage.mixture]
    with Progress("tokenizer", 1) as progress:
        texts = sample_texts(entries, recipe.tokenizer.samples_per_task, recipe.seed)
        tokenizer = train_tokenizer(texts, recipe.tokenizer)
        with atomic_directory(out) as partial:
            Chat(tokenizer, default_template()).save(partial)
        progress.update(1, f"{tokenizer.vocab_size} tokens")


def make_data(recipe: Recipe, stage: StageConfig, tokenizer: Path, out: Path, workers: int) -> None:
    """Make the documents of one stage and write them into the new folder `out`.

    Args:
        tokenizer: folder of the tokenizer and the chat template.
        workers: processes; the bytes are the same for any number.

    Raises:
        UserError: a task or its parameters are wrong, documents do not fit into a row, or the disk is full.
    """
    with Progress(f"data {stage.name}", stage.documents) as progress:
        write_stage_data(
            out,
            stage.name,
            stage.mixture,
            stage.documents,
            derive_seed(recipe.seed, stage.name),
            Chat.load(tokenizer),
            recipe.data,
            workers,
            progress_callback=lambda done: progress.update(done, "documents"),
        )
