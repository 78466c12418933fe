"""The card says what the facts say, in front-matter that parses and tables that hold."""

from __future__ import annotations

import dataclasses
import re

import yaml

from openbook.release.card import details, render_card
from openbook.release.facts import ReleaseFacts


def front_matter(card: str) -> dict[str, object]:
    values = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(values, dict)
    return values


def test_front_matter(facts: ReleaseFacts) -> None:
    values = front_matter(render_card(facts))
    assert values["license"] == "apache-2.0"
    assert values["library_name"] == "transformers"
    assert values["pipeline_tag"] == "text-generation"
    (entry,) = values["model-index"]  # type: ignore[misc]
    assert entry["name"] == "pico"
    assert [result["metrics"][0]["value"] for result in entry["results"]] == [0.975, 1.0, 0.5, 0.0]
    assert entry["results"][2]["dataset"]["name"] == "reasoning-gym gcd, hard"


def test_card_states_the_facts(facts: ReleaseFacts) -> None:
    card = render_card(facts)
    for text in (
        "1,234,567 parameters",
        "| gcd | the greatest \\| common divisor | 24,000 |",
        "| gcd | easy | medium | 97.5% | 93.5% to 100.0% | 0.975 | 100 | 500000000 | 42 |",
        "| first | 20,000 | 2,345,678 | 1.2% | 3 | Apache-2.0 | reasoning-gym 0.1.25 | `cdcdcdcdcdcd` |",
        "| second | 1,500 | 3,000,000 | 0.01 | 0.0625 |",
        "| time | 20:34 |",
        "| threads | 2 |",
        "| device | cpu, through torch.compile |",
        "openbook build provenance/recipe.toml --out rebuilt --threads 2 --compile\n",
        f"| recipe | {'ab' * 32} |",
        "ef" * 32,
        "at most 2,048 tokens; no training row had more than 512",
        "the answer will be wrong",
    ):
        assert text in card, text


def test_every_table_has_equal_columns(facts: ReleaseFacts) -> None:
    rows = 0
    for block in re.findall(r"(?:^\|.*\n)+", render_card(facts), flags=re.MULTILINE):
        lines = block.splitlines()
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(widths) == 1, block
        rows += len(lines)
    assert rows > 15


def test_without_scores_the_card_says_so(facts: ReleaseFacts) -> None:
    card = render_card(dataclasses.replace(facts, scores=()))
    assert "made without an evaluation" in card
    assert "model-index" not in front_matter(card)


def test_what_was_not_recorded_is_left_out(facts: ReleaseFacts) -> None:
    training = dataclasses.replace(facts.training, threads=0, seconds=0.0, machine="")
    labels = [label for label, _ in details(dataclasses.replace(facts, training=training))]
    assert "precision" in labels
    assert not {"threads", "time", "machine"} & set(labels)


def test_an_exact_build_names_its_profile_and_needs_no_flags(facts: ReleaseFacts) -> None:
    training = dataclasses.replace(
        facts.training, profile="exact", is_compiled=False, isa="avx2", num_trainers=4, device="cpu"
    )
    card = render_card(dataclasses.replace(facts, training=training))
    for text in (
        "| profile | exact |",
        "| instruction set | avx2 |",
        "| processes | 4 |",
        "openbook build provenance/recipe.toml --out rebuilt\n",
        "On any x86-64 or arm64 processor, with any number of threads,",
    ):
        assert text in card
    assert "On the same kind of machine" not in card
    assert "instruction set" not in render_card(facts)
