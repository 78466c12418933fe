"""The built page as it ships: complete, current, and asking nothing of other places. Needs no browser."""

from __future__ import annotations

import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

from browser.fake_api import WEB

SOURCE = Path(__file__).parents[2] / "web"
MAX_BYTES = 1_000_000


class Elements(HTMLParser):
    """Elements with their attributes, and the text inside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style"):
            self.inline.append(data.strip())


def digest_of_sources() -> str:
    """As the build computes it: see web/vite.config.ts."""
    top = [file for pattern in ("*.json", "*.html", "*.ts") for file in SOURCE.glob(pattern)]
    below = [file for folder in ("src", "public") for file in (SOURCE / folder).rglob("*") if file.is_file()]
    lines = sorted(
        f"{file.relative_to(SOURCE).as_posix()}\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n"
        for file in top + below
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_build_is_that_of_its_sources() -> None:
    assert json.loads((WEB / "build.json").read_text()) == {"sources": digest_of_sources()}, "run `make web`"


def test_index_loads_only_its_own_files_and_has_nothing_inline() -> None:
    elements = Elements((WEB / "index.html").read_text())
    assert not any(elements.inline)
    addresses = []
    for tag, attributes in elements.found:
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        addresses += [attributes[name] for name in ("src", "href") if name in attributes]
        assert tag != "base"
    assert len(addresses) >= 4
    for address in addresses:
        assert address is not None
        assert address.startswith("./"), address
        assert (WEB / address).is_file(), address


def test_style_sheets_load_only_files_of_the_build() -> None:
    sheets = list(WEB.rglob("*.css"))
    addresses = [(sheet, url) for sheet in sheets for url in re.findall(r"url\(([^)]*)\)", sheet.read_text())]
    assert addresses
    for sheet, url in addresses:
        assert (sheet.parent / url.strip("\"'")).is_file(), url
    assert not [sheet for sheet in sheets if "@import" in sheet.read_text()]


def test_every_file_of_the_build_is_used_and_the_whole_is_small() -> None:
    files = [file for file in WEB.rglob("*") if file.is_file()]
    loaders = "".join(file.read_text() for file in files if file.suffix in (".html", ".css", ".js"))
    unused = {file.name for file in files if file.name not in loaders}
    assert unused == {"index.html", "build.json", "licences.md", "licences-fonts.txt"}
    assert {file.suffix for file in files} == {".html", ".css", ".js", ".svg", ".woff2", ".json", ".md", ".txt"}
    assert sum(file.stat().st_size for file in files) < MAX_BYTES


def test_what_is_bundled_is_pinned_and_its_licences_come_along() -> None:
    package = json.loads((SOURCE / "package.json").read_text())
    versions = {**package["dependencies"], **package["devDependencies"]}
    assert not [name for name, version in versions.items() if not re.fullmatch(r"\d+\.\d+\.\d+", version)]
    licences = (WEB / "licences.md").read_text()
    for name in package["dependencies"]:
        if not name.startswith("@fontsource"):
            assert f"## {name} - {versions[name]}" in licences
    assert "SIL OPEN FONT LICENSE" in (WEB / "licences-fonts.txt").read_text()
    lock = json.loads((SOURCE / "package-lock.json").read_text())
    assert not [name for name, entry in lock["packages"].items() if "resolved" in entry]
    assert all("integrity" in entry for name, entry in lock["packages"].items() if name)
