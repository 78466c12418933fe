"""From a finished build to a release folder: weights, what runs them, and the evidence. Whole or absent."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from openbook.core.errors import UserError
from openbook.core.files import atomic_directory, read_bytes, read_json, require_absent, write_json, write_text
from openbook.release.card import render_card
from openbook.release.facts import ReleaseFacts
from openbook.release.gather import data_summary, gather_facts
from openbook.release.manifest import (
    CHECKPOINTS_PATH,
    DATA_PATH,
    ENVIRONMENT_PATH,
    LEDGER_PATH,
    MANIFEST_PATH,
    RECIPE_PATH,
    write_manifest,
)
from openbook.release.report import write_report
from openbook.tokenizer.chat import Chat, default_template
from openbook.tokenizer.tokenizer import Tokenizer, require_match
from openbook.train.ledger import read_ledger
from openbook.train.recipe import load_recipe

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def assemble_release(build: Path, out: Path, model: Path) -> ReleaseFacts:
    """Make the release folder of a build.

    Args:
        build: the build folder: recipe.toml, run.json, tokenizer/, data/<stage>/, trace.jsonl, evals/ if there is any.
        out: the new release folder.
        model: folder with the final config.json and model.safetensors, as `save_model` writes them.

    Returns:
        the facts that its card states.

    Raises:
        UserError: `out` exists, a file of the build is missing or damaged, or the disk is full.
    """
    require_absent(out)
    recipe = load_recipe(build / "recipe.toml")
    entries = read_ledger(build / "trace.jsonl")
    if not entries:
        raise UserError(f"the ledger {build / 'trace.jsonl'} is empty: finish the build before its release is made")
    environment = _environment(build)
    facts = gather_facts(build, model, recipe, entries, environment)
    tokenizer = Tokenizer.load(build / "tokenizer")
    require_match(tokenizer, facts.model["vocab_size"])

    with atomic_directory(out) as partial:
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            shutil.copyfile(model / name, partial / name)
        Chat(tokenizer, default_template()).save(partial)
        write_json(partial / "generation_config.json", _generation_config(tokenizer, facts))
        write_text(partial / "LICENSE", license_text())
        write_text(partial / "README.md", render_card(facts))

        provenance = partial / MANIFEST_PATH.parent
        provenance.mkdir()
        shutil.copyfile(build / "recipe.toml", partial / RECIPE_PATH)
        shutil.copyfile(build / "trace.jsonl", partial / LEDGER_PATH)
        write_json(partial / ENVIRONMENT_PATH, environment)
        write_json(partial / DATA_PATH, data_summary(build, recipe))
        if environment.get("keep_states"):
            for stage in recipe.stages:
                shutil.copytree(build / "train" / stage.name, partial / CHECKPOINTS_PATH / stage.name)
        if (build / "evals").is_dir():
            shutil.copytree(build / "evals", provenance / "evals")
        write_report(provenance / "report.html", facts, entries, read_bytes(build / "recipe.toml", "recipe").decode())
        write_manifest(partial, recipe.hash)
    return facts


def license_text() -> str:
    """The Apache License 2.0, as published."""
    return resources.files("openbook.release").joinpath("apache-2.0.txt").read_text(encoding="utf-8")


def _generation_config(tokenizer: Tokenizer, facts: ReleaseFacts) -> dict[str, Any]:
    """Greedy by default; stop and pad tokens, which other runtimes look for here."""
    return {
        "do_sample": False,
        "eos_token_id": sorted(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
        "max_length": facts.model["max_position_embeddings"],
    }


def _environment(build: Path) -> dict[str, Any]:
    """What the build recorded of its run, and the machine if it did not."""
    run = read_json(build / "run.json", "record of the run")
    if not isinstance(run, dict):
        raise UserError(f"the record of the run {build / 'run.json'} is not a JSON object: build into a new folder")
    return {**run, "machine": run.get("machine") or machine()}


def machine() -> str:
    """This machine in words: processor, cores, operating system."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    except OSError:
        pass  # not Linux
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{processor}, {cores} core{'s' if cores != 1 else ''}, {platform.system()} {platform.machine()}"
