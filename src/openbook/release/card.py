"""The model card: README.md of a release, written from its facts and from nothing else."""

from __future__ import annotations

from functools import cache

import jinja2

from openbook.core.progress import format_duration
from openbook.release.facts import ReleaseFacts

MAX_CHARACTERS = 800  # shown of one part of a transcript


def render_card(facts: ReleaseFacts) -> str:
    """The text of README.md: front-matter that model hubs read, then the card."""
    text = (
        environment()
        .get_template("card.md.jinja")
        .render(facts=facts, details=details(facts), rebuild_flags=_rebuild_flags(facts))
    )
    return text.rstrip() + "\n"


def details(facts: ReleaseFacts) -> list[tuple[str, str]]:
    """Labels and values of the table about training; what a build did not record is left out."""
    training, model = facts.training, facts.model
    shape = (
        f"{model['model_type']}: {model['num_hidden_layers']} layers, hidden size {model['hidden_size']}, "
        f"{model['num_attention_heads']} query and {model['num_key_value_heads']} key-value heads of "
        f"{model['head_dim']}, vocabulary {model['vocab_size']:,}"
    )
    rows = [
        ("recipe", facts.recipe_sha256),
        ("model.safetensors", facts.weights_sha256),
        ("architecture", shape),
        ("steps", f"{facts.steps:,}"),
        ("tokens read", f"{facts.trained_tokens:,}"),
        ("profile", training.profile),
        ("precision", training.precision),
        ("optimizer", training.optimizer),
        ("device", training.device + (", through torch.compile" if training.is_compiled else "")),
        ("instruction set", training.isa),
        ("threads", str(training.threads) if training.threads else ""),
        ("processes", str(training.num_trainers) if training.num_trainers > 1 else ""),
        ("machine", training.machine),
        ("time", format_duration(training.seconds) if training.seconds else ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in training.versions.items())),
    ]
    return [(label, value) for label, value in rows if value]


def _rebuild_flags(facts: ReleaseFacts) -> str:
    """What the build command needs to go the same way: in the fast profile other flags may give other bits."""
    training = facts.training
    if training.profile == "exact":
        return ""
    device = f" --device {training.device}" if training.device not in ("", "cpu") else ""
    threads = f" --threads {training.threads}" if training.threads else ""
    return f"{device}{threads} {'--compile' if training.is_compiled else '--no-compile'}"


@cache
def environment() -> jinja2.Environment:
    """Templates of this folder. HTML is escaped, a name that is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("openbook", "release"),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = percent
    environment.filters["cell"] = _cell
    environment.filters["shorten"] = _shorten
    return environment


def percent(share: float) -> str:
    """A share of 1.0 as "97.5%"."""
    return f"{100 * share:.1f}%"


def _cell(text: str) -> str:
    """Text that stands in one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _shorten(text: str) -> str:
    """Text with its middle left out where it is long, and how much that is."""
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"
