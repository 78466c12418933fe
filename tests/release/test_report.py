"""The report is one small file that needs nothing from outside, with plots that show the values."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from xml.etree import ElementTree

from openbook.release.facts import ReleaseFacts
from openbook.release.plots import MAX_POINTS, plot_curve, plot_scores
from openbook.release.report import render_report, write_report
from openbook.train.ledger import Entry


def test_report_is_one_small_file(facts: ReleaseFacts, entries: list[Entry], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, facts, entries, 'name = "pico"  # <b>')
    html = path.read_text()
    assert path.stat().st_size < 300_000
    assert html.count("<svg") == html.count("</svg>") == 4
    links = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', html)
    assert links and all((a or b).startswith("#") for a, b in links)
    assert "GCD of &lt;12&gt; &amp; 18?" in html and "# &lt;b&gt;" in html
    for text in ("1,234,567", "97.5%", "20:34", "Apache-2.0", "18 = 1 * 12 + 6", "6,000,000"):
        assert text in html, text


def test_report_is_a_function_of_its_input(facts: ReleaseFacts, entries: list[Entry]) -> None:
    assert render_report(facts, entries, "r") == render_report(facts, entries, "r")


def test_report_without_scores(facts: ReleaseFacts, entries: list[Entry]) -> None:
    html = render_report(dataclasses.replace(facts, scores=(), transcripts=()), entries[:1], "r")
    assert html.count("<svg") == 3
    assert "Accuracy by task" not in html


def test_ids_in_the_page_are_unique_and_used(facts: ReleaseFacts, entries: list[Entry]) -> None:
    html = render_report(facts, entries, "r")
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', html)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_a_large_model_has_a_small_report(facts: ReleaseFacts, entries: list[Entry]) -> None:
    scores = tuple(
        dataclasses.replace(facts.scores[0], task=f"task_{number}", difficulty=difficulty, effort=effort)
        for number in range(20)
        for difficulty in ("easy", "hard")
        for effort in ("low", "medium", "high")
    )
    long = dataclasses.replace(facts.transcripts[0], problem="p" * 5000, thinking="x" * 100_000, answer="a" * 5000)
    html = render_report(dataclasses.replace(facts, scores=scores, transcripts=(long,) * 40), entries, "r")
    assert "99,200 characters left out" in html
    assert len(html.encode()) < 400_000


def test_curve_is_valid_svg_with_bounded_points(entries: list[Entry]) -> None:
    svg = plot_curve(entries, lambda entry: entry.loss, "loss", log=True)
    root = ElementTree.fromstring(svg)
    line = next(
        path
        for path in root.iter("{http://www.w3.org/2000/svg}path")
        if "stroke: var(--series-1)" in path.get("style", "")
    )
    assert 2 <= len(re.findall(r"[ML] ", line.get("d", ""))) <= MAX_POINTS
    text = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"first", "second", "loss", "step"} <= set(text)
    assert not re.search(r"#[0-9a-f]{6}\b", svg), "a colour that does not follow the page"


def test_bars_are_as_long_as_the_accuracy(facts: ReleaseFacts) -> None:
    chosen = tuple(
        dataclasses.replace(score, accuracy=a) for score, a in zip(facts.scores[:2], (1.0, 0.5), strict=True)
    )
    svg = plot_scores(chosen)
    bars = re.findall(r'<path d="M ([\d.]+) [\d.]+\s+L ([\d.]+) [^"]*" [^>]*style="fill: var\(--series-1\)', svg)
    lengths = [float(stop) - float(start) for start, stop in bars[:2]]
    assert abs(lengths[0] - 2 * lengths[1]) < 0.1
