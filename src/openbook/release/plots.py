"""Plots of a build as SVG that takes its colours from the page around it, in light and dark."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from openbook.release.facts import Score
from openbook.train.ledger import Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 300  # a curve: more cannot be seen at this width, and would make the page heavy
WIDTH_INCHES = 7.4

# Colours that no plot uses for itself; each is replaced by a CSS variable of the page.
_INK, _GRID = "#010203", "#040506"
_SERIES = tuple(f"#0a0b0{number}" for number in range(1, 7))  # easy and hard, three efforts each
_CSS = {_INK: "var(--ink)", _GRID: "var(--grid)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(_SERIES, start=1)
}


def plot_curve(entries: Sequence[Entry], value: Callable[[Entry], float], label: str, *, log: bool = False) -> str:
    """A value over steps: the mean of neighbouring steps as a line, their range as a band, stages marked.

    Args:
        entries: the ledger, at least one line.
        value: what to plot of a line.
        label: of the vertical axis, with the unit.
        log: whether that axis is logarithmic.
    """
    with _figure(2.5) as (figure, axes):
        bins = _bins(entries)
        steps = [sum(entry.step for entry in chunk) / len(chunk) for chunk in bins]
        values = [[value(entry) for entry in chunk] for chunk in bins]
        axes.fill_between(
            steps, [min(v) for v in values], [max(v) for v in values], color=_SERIES[0], alpha=0.18, linewidth=0
        )
        axes.plot(steps, [sum(v) / len(v) for v in values], color=_SERIES[0], linewidth=1.4)
        if log and min(min(v) for v in values) > 0:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=min(0.0, *(min(v) for v in values)))
        axes.set_xlim(entries[0].step, max(entries[-1].step, entries[0].step + 1))
        _mark_stages(axes, entries)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        return _svg(figure, label)


def plot_scores(scores: Sequence[Score]) -> str:
    """Accuracy of each task with its 95% interval, one row a task, one colour for each difficulty and effort."""
    tasks = list(dict.fromkeys(score.task for score in scores))
    kinds = list(dict.fromkeys((score.difficulty, score.effort) for score in scores))
    with _figure(0.75 + 0.26 * len(tasks) * max(1.0, 0.6 * len(kinds))) as (figure, axes):
        for number, kind in enumerate(kinds):
            chosen = [score for score in scores if (score.difficulty, score.effort) == kind]
            offset = (number - (len(kinds) - 1) / 2) * 0.7 / len(kinds)
            rows = [tasks.index(score.task) + offset for score in chosen]
            shares = [100 * score.accuracy for score in chosen]
            spread = [
                [max(0.0, 100 * (score.accuracy - score.low)) for score in chosen],
                [max(0.0, 100 * (score.high - score.accuracy)) for score in chosen],
            ]
            color = _SERIES[number % len(_SERIES)]
            axes.barh(rows, shares, height=0.62 / len(kinds), color=color, alpha=0.28)
            axes.errorbar(
                shares, rows, xerr=spread, fmt="o", markersize=3.5, capsize=2.5, color=color, label=", ".join(kind)
            )
        axes.set_yticks(range(len(tasks)), tasks)
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        axes.set_xlim(-1, 102)
        axes.set_xlabel("accuracy, %, with 95% interval")
        axes.grid(axis="y", visible=False)
        if len(kinds) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(kinds), frameon=False, labelcolor=_INK)
        return _svg(figure, "accuracy by task")


def _bins(entries: Sequence[Entry]) -> list[Sequence[Entry]]:
    """Neighbouring lines in at most `MAX_POINTS` chunks of almost equal size."""
    num_bins = min(MAX_POINTS, len(entries))
    edges = [index * len(entries) // num_bins for index in range(num_bins + 1)]
    return [entries[start:stop] for start, stop in itertools.pairwise(edges)]


def _mark_stages(axes: Axes, entries: Sequence[Entry]) -> None:
    """A line and a name where a stage begins, if there is more than one."""
    first_steps: dict[str, int] = {}
    for entry in entries:
        first_steps.setdefault(entry.stage, entry.step)
    if len(first_steps) < 2:
        return
    for name, step in first_steps.items():
        axes.axvline(step, color=_GRID, linewidth=1, linestyle="--")
        axes.annotate(
            name, (step, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points", color=_INK
        )


@contextmanager
def _figure(height_inches: float) -> Iterator[tuple[Figure, Axes]]:
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {  # matplotlib types its keys one by one
        "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
        "svg.hashsalt": "openbook",  # the same bytes every time
        "font.size": 9,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _GRID,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "grid.color": _GRID,
        "grid.linewidth": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        yield figure, figure.add_subplot()


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element that scales with its column; colours and font come from the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r"(\.\d\d)\d+", r"\1", text)
    # Ids are unique in one SVG only; several stand in one page.
    prefix = re.sub(r"\W+", "-", title)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", text)
    for color, variable in _CSS.items():
        text = text.replace(color, variable)
    head, rest = text.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{view[0]} role="img" aria-label="{title}">{rest.strip()}'
    )
