"""Reads the facts of a release from the files of its build."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from openbook.core.files import read_json, sha256_file
from openbook.data.shards import MANIFEST_FILE, read_manifest
from openbook.release.facts import ReleaseFacts, StageFacts, TaskFacts, TrainingFacts, read_scores, read_transcripts
from openbook.tasks.registry import get_task
from openbook.train.ledger import Entry
from openbook.train.recipe import Recipe, StageConfig

NUM_FINAL_STEPS = 50  # the loss at the end of a stage is the mean over this many


def gather_facts(
    build: Path, model: Path, recipe: Recipe, entries: Sequence[Entry], environment: Mapping[str, Any]
) -> ReleaseFacts:
    """All facts of a build.

    Args:
        build: the build folder.
        model: folder with the final config.json and model.safetensors.
        recipe: the build's recipe.
        entries: its ledger.
        environment: the record of its run.

    Raises:
        UserError: a file is missing or damaged.
    """
    stages = tuple(_stage(build / "data" / stage.name, stage, entries) for stage in recipe.stages)
    documents: Counter[str] = Counter()
    for stage in stages:
        documents.update(stage.tasks)
    return ReleaseFacts(
        name=recipe.name,
        description=recipe.description,
        license=recipe.license,
        recipe_sha256=recipe.hash,
        weights_sha256=sha256_file(model / "model.safetensors"),
        num_parameters=count_parameters(model / "model.safetensors"),
        model=read_json(model / "config.json", "model configuration"),
        row_tokens=recipe.data.row_tokens,
        tasks=tuple(
            TaskFacts(name=name, summary=get_task(name).summary, documents=documents[name]) for name in recipe.tasks
        ),
        stages=stages,
        scores=read_scores(build / "evals"),
        training=TrainingFacts(
            profile=recipe.profile,
            precision=recipe.precision,
            optimizer=recipe.optimizer.kind,
            device=str(environment.get("device", "")),
            is_compiled=bool(environment.get("is_compiled", False)),
            machine=str(environment.get("machine", "")),
            threads=int(environment.get("threads", 0)),
            isa=str(environment.get("isa", "")),
            num_trainers=int(environment.get("num_trainers", 1)),
            seconds=float(environment.get("seconds", 0.0)),
            versions={str(name): str(version) for name, version in environment.get("versions", {}).items()},
        ),
        transcripts=read_transcripts(build / "evals"),
    )


def count_parameters(path: Path) -> int:
    """Elements of all tensors of a safetensors file, from its header."""
    from math import prod

    from safetensors import safe_open

    with safe_open(path, framework="numpy") as tensors:
        return sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def data_summary(build: Path, recipe: Recipe) -> dict[str, Any]:
    """What data.json says: each stage's manifest without its list of files, and the hash that the manifest has.

    Raises:
        UserError: a manifest is missing or damaged.
    """
    stages = []
    for stage in recipe.stages:
        folder = build / "data" / stage.name
        manifest = read_manifest(folder)
        values = msgspec.to_builtins(manifest)
        del values["files"]
        values["files"] = len(manifest.files)
        values["bytes"] = sum(file.bytes for file in manifest.files)
        stages.append({**values, "manifest_sha256": sha256_file(folder / MANIFEST_FILE)})
    return {"stages": stages}


def _stage(folder: Path, stage: StageConfig, entries: Sequence[Entry]) -> StageFacts:
    manifest = read_manifest(folder)
    steps = [entry for entry in entries if entry.stage == stage.name]
    last = steps[-NUM_FINAL_STEPS:]
    return StageFacts(
        name=stage.name,
        steps=len(steps),
        trained_tokens=sum(entry.tokens for entry in steps),
        lr=stage.schedule.lr,
        final_loss=sum(entry.loss for entry in last) / max(1, len(last)),
        documents=manifest.documents,
        tokens=manifest.tokens,
        padding_share=manifest.padding_share,
        tasks=manifest.documents_by_task,
        licenses=manifest.licenses,
        generators=tuple(f"{name} {version}" for name, version in manifest.generators.items()),
        refused=manifest.refused.get("published", 0),
        manifest_sha256=sha256_file(folder / MANIFEST_FILE),
    )
