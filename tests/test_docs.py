"""The docs say what is: the command line page is current, links resolve, `make` targets and commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from openbook.cli.main import COMMANDS
from openbook.cli.reference import render

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def page_ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as repository hosts make them."""
    headings = re.findall(r"^#+ +(.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_cli_page_is_current() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == render(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page_ids(page)} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{page_ids(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_commands_in_code_exist(page: Path) -> None:
    """Inline code and code blocks may name only targets of the Makefile and commands that there are."""
    text = page.read_text()
    code = "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", text, flags=re.MULTILINE | re.DOTALL))
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z0-9-]+)", code)) <= targets
    assert set(re.findall(r"^(?:`|\$ )?openbook ([a-z]+)", code, flags=re.MULTILINE)) <= set(COMMANDS)


def test_architecture_page_has_the_layers_of_the_contract() -> None:
    import tomllib

    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    line = " > ".join(contract["layers"])
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert line in text
    folders = {name for layer in contract["layers"] for name in layer.split(" | ")}
    assert folders <= set(re.findall(r"^\| `(\w+)/`", text, flags=re.MULTILINE))


def test_licence_of_project_and_releases_is_the_same_text() -> None:
    from openbook.release.assemble import license_text

    assert (ROOT / "LICENSE").read_text() == license_text()
