"""Several conversations, kept in the browser."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from browser.fake_api import FakeApi, ends, says
from browser.reading import answers, ask, expect, questions, wait_for_answer

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = pytest.mark.browser


def entries(page: Page) -> Locator:
    """The table of contents."""
    return page.get_by_role("navigation", name="Conversations").get_by_role("listitem")


def begin(page: Page, api: FakeApi, question: str, reply: str) -> None:
    """A conversation of one question."""
    api.will(says(reply), ends())
    page.get_by_role("button", name="New conversation").click()
    ask(page, question)
    wait_for_answer(page)


def choose(page: Page, title: str, action: str) -> None:
    """An action from the menu of an entry."""
    page.get_by_role("button", name=f"More for {title}").click()
    page.get_by_role("menuitem", name=action).click()


def test_conversations_stay_apart_and_survive_a_reload(page: Page, api: FakeApi) -> None:
    begin(page, api, "About ants", "They have six legs.")
    begin(page, api, "About spiders", "They have eight.")
    assert [request.body["messages"] for request in api.asked] == [
        [{"role": "user", "content": "About ants"}],
        [{"role": "user", "content": "About spiders"}],
    ]
    expect(entries(page)).to_have_text([re.compile("About spiders"), re.compile("About ants")])
    page.get_by_role("link", name="About ants").click()
    assert answers(page) == ["They have six legs."]
    assert page.title() == "About ants – Openbook"
    page.reload()
    wait_for_answer(page)
    assert questions(page) == ["About ants"], "the address names the conversation"
    expect(entries(page)).to_have_count(2)
    page.go_back()
    page.wait_for_function("() => document.querySelector('.question-text').textContent === 'About spiders'")


def test_two_conversations_are_answered_at_once(page: Page, api: FakeApi) -> None:
    first, second = threading.Event(), threading.Event()
    api.will(says("ant"), first, says("hill"), ends())
    api.will(says("web"), second, says("site"), ends())
    ask(page, "One")
    page.get_by_text("ant", exact=True).wait_for()
    page.get_by_role("button", name="New conversation").click()
    ask(page, "Two")
    page.get_by_text("web", exact=True).wait_for()
    first.set()
    page.get_by_role("link", name="One").click()
    wait_for_answer(page)
    assert answers(page) == ["anthill"]
    page.get_by_role("link", name="Two").click()
    second.set()
    wait_for_answer(page)
    assert answers(page) == ["website"]


def test_a_conversation_is_renamed(page: Page, api: FakeApi) -> None:
    begin(page, api, "About ants", "Six.")
    choose(page, "About ants", "Rename")
    field = page.get_by_role("textbox", name="Name of the conversation")
    expect(field).to_be_focused()
    field.fill("Insects")
    field.press("Enter")
    expect(page.get_by_role("heading", name="Insects")).to_be_visible()
    page.reload()
    expect(entries(page)).to_have_text([re.compile("Insects")])
    choose(page, "Insects", "Rename")
    field.fill("Beetles")
    field.press("Escape")
    expect(entries(page)).to_have_text([re.compile("Insects")])


def test_a_conversation_is_deleted_and_the_deletion_undone(page: Page, api: FakeApi) -> None:
    begin(page, api, "About ants", "Six.")
    begin(page, api, "About spiders", "Eight.")
    choose(page, "About spiders", "Delete")
    expect(entries(page)).to_have_text([re.compile("About ants")])
    expect(page.get_by_role("region", name="Start")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    wait_for_answer(page)
    assert answers(page) == ["Eight."]
    choose(page, "About spiders", "Delete")
    page.reload()
    expect(entries(page)).to_have_text([re.compile("About ants")])


def test_deleting_stops_the_answer(page: Page, api: FakeApi) -> None:
    api.will(says("One"), threading.Event(), ends())
    ask(page, "Count")
    page.get_by_text("One", exact=True).wait_for()
    choose(page, "Count", "Delete")
    assert api.left.wait(5)
    expect(entries(page)).to_have_count(0)
    begin(page, api, "Next", "Fine.")
    assert answers(page) == ["Fine."]


def test_conversations_are_exported_whole(page: Page, api: FakeApi) -> None:
    begin(page, api, "About ants", "Six.")
    begin(page, api, "About spiders", "Eight.")
    with page.expect_download() as download:
        choose(page, "About ants", "Export as JSON")
    assert download.value.suggested_filename == "about-ants.json"
    conversation = json.loads(download.value.path().read_text())
    assert [turn["text"] for turn in conversation["turns"].values()] == ["About ants", "Six."]
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    everything = json.loads(download.value.path().read_text())
    assert [each["setup"]["model"] for each in everything] == ["nano", "nano"]
    assert everything[1] == conversation


def test_an_answer_that_ran_when_the_page_closed_is_kept_as_far_as_it_got(page: Page, api: FakeApi) -> None:
    api.will(says("One, "), threading.Event(), ends())
    ask(page, "Count")
    page.get_by_text("One,", exact=True).first.wait_for()
    page.reload()
    wait_for_answer(page)
    expect(page.locator(".ending")).to_have_text("Stopped.")
    assert answers(page) == ["One,"]


def test_another_tab_sees_what_this_one_does(page: Page, api: FakeApi) -> None:
    other = page.context.new_page()
    other.goto(api.url)
    other.locator(".opening").wait_for()
    begin(page, api, "About ants", "Six.")
    expect(entries(other)).to_have_text([re.compile("About ants")])
    choose(page, "About ants", "Delete")
    expect(entries(other)).to_have_count(0)


def test_a_conversation_goes_on_with_another_model_when_its_own_is_gone(
    make_page: Callable[..., Page], api: FakeApi
) -> None:
    page = make_page()
    begin(page, api, "About ants", "Six.")
    api.models[0]["id"] = "mini"
    page.reload()
    wait_for_answer(page)
    ask(page, "And spiders?")
    wait_for_answer(page, 2)
    assert api.asked[1].body["model"] == "mini"
