"""A release is made whole from a build, states its facts, and runs in Transformers as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from openbook.core.errors import UserError
from openbook.engine.model import Model
from openbook.release.assemble import assemble_release, license_text, machine
from openbook.release.manifest import read_manifest
from openbook.train.ledger import read_ledger
from openbook.train.recipe import load_recipe

FILES = [
    "LICENSE",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "provenance/data.json",
    "provenance/environment.json",
    "provenance/evals/easy-medium/gcd.jsonl",
    "provenance/evals/easy-medium/spell_backward.jsonl",
    "provenance/evals/easy-medium/summary.json",
    "provenance/recipe.toml",
    "provenance/report.html",
    "provenance/trace.jsonl",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture
def build(finished_build: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished_build, tmp_path / "build", ignore=shutil.ignore_patterns("release")))


def test_release_has_these_files(made_release: Path) -> None:
    manifest = read_manifest(made_release)
    assert [entry.path for entry in manifest.files] == FILES
    assert manifest.recipe_sha256 == load_recipe(made_release / "provenance" / "recipe.toml").hash


def test_card_states_what_the_build_holds(made_release: Path) -> None:
    card = (made_release / "README.md").read_text()
    for text in (
        "| gcd | easy | medium | 50.0% | 9.5% to 90.5% | 0.500 | 2 | 500000000 | 20 |",
        "| first | 4 | 2,006 | 0.01 | 4.2500 |",
        "| time | 1:15 |",
        "| machine | A processor, 2 cores |",
        "reasoning-gym 0.1.25",
    ):
        assert text in card, text


def test_data_summary_counts_every_document(made_release: Path) -> None:
    stages = json.loads((made_release / "provenance" / "data.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["first", "second"]
    assert [sum(stage["documents_by_task"].values()) for stage in stages] == [30, 40]
    assert all(len(stage["manifest_sha256"]) == 64 for stage in stages)


def test_report_shows_a_right_and_a_wrong_answer_of_each_task(made_release: Path) -> None:
    html = (made_release / "provenance" / "report.html").read_text()
    for task in ("gcd", "spell_backward"):
        assert f"thinking about {task} 0" in html
        assert f"thinking about {task} 1" in html


def test_the_ledger_is_carried_whole(finished_build: Path, made_release: Path) -> None:
    assert read_ledger(made_release / "provenance" / "trace.jsonl") == read_ledger(finished_build / "trace.jsonl")


def test_weights_are_a_function_of_the_build(build: Path, made_release: Path) -> None:
    assemble_release(build, build / "again", build / "model")
    assert [entry.sha256 for entry in read_manifest(build / "again").files] == [
        entry.sha256 for entry in read_manifest(made_release).files
    ]


def test_our_engine_runs_it(made_release: Path) -> None:
    model = Model.load(made_release)
    assert model.tasks == ["spell_backward", "gcd"]
    assert model.chat("Spell this word backward: ab", max_tokens=5).usage.completion_tokens == 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers_generates_the_same_tokens(made_release: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(made_release)
    model = transformers.AutoModelForCausalLM.from_pretrained(made_release, dtype=torch.float32)
    assert model.generation_config.do_sample is False
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Spell this word backward: ab"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=40)[0][inputs["input_ids"].shape[1] :].tolist()
    answer = Model.load(made_release).chat("Spell this word backward: ab", max_tokens=40)
    assert output == answer.token_ids
    assert len(output) > 5


def test_an_existing_release_is_not_touched(build: Path) -> None:
    out = build / "release"
    out.mkdir()
    with pytest.raises(UserError, match="exists already and nothing is overwritten"):
        assemble_release(build, out, build / "model")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("recipe.toml", "cannot read the recipe"),
        ("run.json", "cannot read the record of the run"),
        ("trace.jsonl", "cannot read the ledger"),
        ("tokenizer/tokenizer.json", "cannot read the tokenizer"),
        ("data/second/manifest.json", "cannot read the data manifest"),
        ("model/config.json", "cannot read the model configuration"),
        ("model/model.safetensors", "cannot read the file"),
        ("evals/easy-medium/gcd.jsonl", "cannot read the file of items"),
    ],
)
def test_a_missing_file_is_named_and_nothing_is_left(build: Path, path: str, message: str) -> None:
    (build / path).unlink()
    with pytest.raises(UserError) as caught:
        assemble_release(build, build / "release", build / "model")
    assert message in str(caught.value)
    assert path.split("/")[-1] in str(caught.value)
    assert not list(build.glob("release*"))


def test_an_empty_ledger_is_refused(build: Path) -> None:
    (build / "trace.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="is empty: finish the build before its release is made"):
        assemble_release(build, build / "release", build / "model")


def test_licence_and_machine() -> None:
    assert "Apache License" in license_text()[:100]
    assert " core" in machine()
