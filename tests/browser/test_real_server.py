"""The page on the server it is for: nano, answering under the policy that is really sent."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browser.reading import answers, ask, expect, wait_for_answer

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser


@pytest.fixture
def served() -> Iterator[str]:
    """The address of a server of nano in a process of its own."""
    command = [sys.executable, "-m", "openbook.cli.main", "serve", "nano", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        timer = threading.Timer(60, server.kill)
        timer.start()
        try:
            assert server.stdout is not None
            lines = iter(server.stdout.readline, "")
            found = next((match for line in lines if (match := re.search(r"nano: (http://\S+)", line))), None)
            assert found, "the server did not say where it is"
            timer.cancel()
            yield f"{found[1]}/"
        finally:
            timer.cancel()
            server.terminate()
            server.communicate(timeout=30)


def test_nano_solves_the_problems_that_the_page_offers(
    make_page: Callable[..., Page], served: str, shoot: Callable[[Page, str], Path], tmp_path: Path
) -> None:
    page = make_page(url=served, viewport={"width": 1280, "height": 860})
    solved = []
    for number in (3, 2, 1, 0):
        page.get_by_role("button", name="New conversation").click()
        page.locator(".example").nth(number).click()
        wait_for_answer(page)
        solved += answers(page)
    assert solved == ["44", "137", "enots", "12"]
    page.get_by_role("radio", name="high").check()
    ask(page, "State the final answer to the following arithmetic problem: 60 + 93 - 16 =")
    wait_for_answer(page, 2)
    assert answers(page) == ["12", "137"]
    folds = page.get_by_role("button", name="Thought for")
    folds.last.click()
    folds.first.click()
    expect(page.locator(".working").first).to_contain_text("63-21=42-21=21-21=00")
    expect(page.locator(".working").last).to_contain_text("7310+6100=3510")  # only high effort checks the steps
    page.mouse.move(0, 0)
    shoot(page, "page-light")
    page.emulate_media(color_scheme="dark")
    shoot(page, "page-dark")

    page.get_by_role("button", name="Receipt").first.click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download receipt.json").click()
    receipt = tmp_path / "receipt.json"
    download.value.save_as(receipt)
    assert json.loads(receipt.read_text())["profile"] == "exact"
    command = [sys.executable, "-m", "openbook.cli.main", "verify", str(receipt)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page.keyboard.press("Escape")

    page.get_by_role("button", name="Answer again with token probabilities").last.click()
    page.get_by_text("2 / 2").wait_for()
    wait_for_answer(page, 2)
    assert "".join(page.get_by_role("listbox", name="Tokens of the answer").all_inner_texts()) == "137"
    folds.last.click()
    thoughts = page.get_by_role("listbox", name="Tokens of the thinking")
    expect(thoughts).to_have_text(re.compile("7310\\+6100=3510"))


def test_at_360_pixels(make_page: Callable[..., Page], served: str, shoot: Callable[[Page, str], Path]) -> None:
    page = make_page(url=served, viewport={"width": 360, "height": 740}, device_scale_factor=2)
    page.locator(".example").nth(1).click()
    wait_for_answer(page)
    ask(page, "State the final answer to the following arithmetic problem: 60 + 93 - 16 =")
    wait_for_answer(page, 2)
    page.get_by_role("button", name="Thought for").first.click()
    expect(page.locator(".working").first).to_contain_text("0s1t2o3n4e")
    page.mouse.move(0, 0)
    shoot(page, "page-narrow")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
