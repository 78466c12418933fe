"""What tests of the page do over and over."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Locator, LocatorAssertions, Page


def expect(locator: Locator) -> LocatorAssertions:
    """Playwright's, imported only when called: pytest reads these files where Playwright is not installed, too."""
    from playwright.sync_api import expect as its_expect

    return its_expect(locator)


def ask(page: Page, text: str) -> None:
    """Type a question and send it by Enter."""
    field = page.get_by_role("textbox", name="Your question")
    field.fill(text)
    field.press("Enter")


def wait_for_answer(page: Page, number: int = 1) -> None:
    """Until so many answers are in view, the last of them complete."""
    page.wait_for_function(
        "number => document.querySelectorAll('.answer').length === number"
        " && document.querySelectorAll('.answer[aria-busy=false]').length === number",
        arg=number,
    )


def questions(page: Page) -> list[str]:
    """Those in view."""
    return page.locator(".question-text").all_inner_texts()


def answers(page: Page) -> list[str]:
    """The texts of those in view, without thinking."""
    return page.locator(".answer > .prose").all_inner_texts()
