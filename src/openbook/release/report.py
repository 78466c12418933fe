"""The report of a build: one HTML file with plots and tables, readable offline, in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from openbook.core.files import write_text
from openbook.core.progress import format_duration
from openbook.release.card import details, environment
from openbook.release.facts import ReleaseFacts
from openbook.release.plots import plot_curve, plot_scores
from openbook.train.ledger import Entry


def write_report(path: Path, facts: ReleaseFacts, entries: Sequence[Entry], recipe: str) -> None:
    """Write the report.

    Args:
        path: the HTML file.
        facts: of the release.
        entries: the ledger, in order, at least one line.
        recipe: the text of the recipe.

    Raises:
        UserError: the file cannot be written.
    """
    write_text(path, render_report(facts, entries, recipe))


def render_report(facts: ReleaseFacts, entries: Sequence[Entry], recipe: str) -> str:
    """The HTML of the report; see `write_report`."""
    curves = [
        plot_curve(entries, lambda entry: entry.loss, "loss, nats a token", log=True),
        plot_curve(entries, lambda entry: entry.lr, "learning rate"),
        plot_curve(entries, lambda entry: entry.grad_norm, "gradient norm", log=True),
    ]
    template = environment().get_template("report.html.jinja")
    return template.render(
        facts=facts,
        curves=[Markup(curve) for curve in curves],
        score_plot=Markup(plot_scores(facts.scores)) if facts.scores else "",
        details=details(facts),
        duration=format_duration,
        recipe=recipe,
    )
