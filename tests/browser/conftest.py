"""A real Chromium, a server under the test's control, and a page on which nothing may go wrong unseen."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from browser.fake_api import FakeApi

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 15_000  # two busy cores may take long
DESKTOP = {"width": 1280, "height": 800}
NARROW = {"width": 360, "height": 740}

# Collects what the policy forbade, from the first moment of each page.
_WATCH = """
window.forbidden = [];
addEventListener("securitypolicyviolation", (event) =>
  forbidden.push(`${event.effectiveDirective} ${event.blockedURI} ${event.sourceFile}:${event.lineNumber}`));
"""


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, or the one that CHROMIUM names."""
    from playwright.sync_api import expect, sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert path, "these tests need Chromium: install it (apt-get install chromium), or name it in CHROMIUM"
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def api() -> Iterator[FakeApi]:
    """A server without any script yet."""
    with FakeApi() as api:
        yield api


@dataclass
class Watch:
    """What a context's pages did."""

    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # uncaught, or on the console
    allows_errors: bool = False  # of the network, which a test provokes


@pytest.fixture
def watch() -> Watch:
    """Filled while the test runs."""
    return Watch()


@pytest.fixture
def make_page(browser: Browser, api: FakeApi, watch: Watch) -> Iterator[Callable[..., Page]]:
    """Opens the page in a context of its own; at the end nothing must have gone wrong on any of them."""
    contexts: list[BrowserContext] = []
    origins = [api.url]

    def make(url: str = api.url, **options: Any) -> Page:
        origins.append(url)
        context = browser.new_context(**{"viewport": DESKTOP, "reduced_motion": "reduce", **options})
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        context.add_init_script(_WATCH)
        context.on("request", lambda request: watch.requests.append(request.url))
        context.on("weberror", lambda error: watch.errors.append(str(error.error)))
        context.on(
            "console", lambda line: watch.errors.append(line.text) if line.type in ("error", "warning") else None
        )
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(url)
        page.locator(".opening, .thread, dialog").first.wait_for()
        return page

    yield make
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("window.forbidden") == []
        context.close()
    own = ("data:", *origins, *(f"blob:{origin}" for origin in origins))
    elsewhere = [url for url in watch.requests if not url.startswith(own)]
    assert elsewhere == []
    assert [error for error in watch.errors if not watch.allows_errors or "Failed to load resource" not in error] == []


@pytest.fixture
def page(make_page: Callable[..., Page]) -> Page:
    """The page on a desktop, freshly opened."""
    return make_page()


@pytest.fixture
def shoot(tmp_path: Path) -> Callable[[Page, str], Path]:
    """Takes a picture of what is seen, into the folder that OPENBOOK_SCREENSHOTS names or one of the test."""
    folder = Path(os.environ.get("OPENBOOK_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)

    def shoot(page: Page, name: str) -> Path:
        page.evaluate("document.fonts.ready")
        path = folder / f"{name}.png"
        page.screenshot(path=path)
        return path

    return shoot
