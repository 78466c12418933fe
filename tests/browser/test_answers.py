"""One question and its answer: as it streams, stopped, asked again, edited, refused."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from browser.conftest import Watch
from browser.fake_api import FakeApi, ends, model, refuses, says, thinks, usage
from browser.reading import answers, ask, expect, questions, wait_for_answer

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

AT_THE_FOOT = (
    "() => [...document.querySelectorAll('.thread')].every(it => it.scrollHeight - it.scrollTop - it.clientHeight < 2)"
)


def test_the_start_says_what_the_model_was_trained_on_and_offers_problems(page: Page, api: FakeApi) -> None:
    start = page.get_by_role("region", name="Start")
    assert "nano was trained on 7 kinds of problems: spell backward, chain sum," in start.inner_text()
    assert "Asked for anything else, it may be wrong." in start.inner_text()
    examples = start.get_by_role("listitem")
    assert examples.count() == 4
    api.will(says("12"), ends())
    examples.filter(has_text="Greatest common divisor").get_by_role("button").click()
    wait_for_answer(page)
    asked = "Find the Greatest Common Divisor (GCD) of these numbers: 84, 36. Give only the GCD as your final answer."
    assert [asked] == questions(page)
    assert api.asked[0].body["messages"] == [{"role": "user", "content": asked}]


def test_every_example_is_put_as_its_task_puts_it(page: Page, api: FakeApi) -> None:
    from openbook.tasks.registry import get_task

    def shape(text: str) -> str:
        return re.sub(
            r"(numbers: )[\d, ]+|(problem: ).*(?==)|(nus\): )\w+|(if you have ).*(?=\?)", r"\1\2\3\4 ...", text
        )

    for task in ("gcd", "spell_backward", "chain_sum", "leg_counting"):
        page.get_by_role("button", name="New conversation").click()
        page.locator(".example").nth(len(api.asked)).click()
        wait_for_answer(page)
        text = api.asked[-1].body["messages"][0]["content"]
        assert "..." in shape(text)
        assert shape(text) == shape(get_task(task).generate(1).question)


def test_a_model_of_others_gets_no_problems_to_try(make_page: Callable[..., Page], api: FakeApi) -> None:
    api.models = [model("smollm2", tasks=[])]
    page = make_page()
    expect(page.get_by_role("heading", name="smollm2")).to_be_visible()
    expect(page.locator(".example")).to_have_count(0)


def test_an_answer_streams_and_thinking_is_folded_live_with_time_and_tokens(page: Page, api: FakeApi) -> None:
    thinking, answering = threading.Event(), threading.Event()
    api.will(
        thinks("48-63=84", "-63=21\n"), thinking, thinks("12"), says("It "), answering, says("is 12."),
        ends(usage=usage(30, 46, 41)),
    )  # fmt: skip
    ask(page, "gcd of 84 and 36?")
    fold = page.locator(".thinking-fold")
    expect(fold).to_have_text(re.compile(r"^Thinking \d+(\.\d)? m?s · 2 tokens$"))
    expect(page.get_by_text("48-63=84")).to_be_hidden()
    fold.click()
    assert page.locator(".working").inner_text().strip() == "48-63=84-63=21"
    thinking.set()
    page.get_by_role("button", name="Thought for").wait_for()
    page.get_by_text("It", exact=True).wait_for()
    assert page.locator(".answer").get_attribute("aria-busy") == "true"
    answering.set()
    wait_for_answer(page)
    assert answers(page) == ["It is 12."]
    # The server's own count is the last word.
    expect(fold).to_have_text(re.compile(r"^Thought for \d+(\.\d)? m?s · 41 tokens$"))
    expect(page.locator(".figures")).to_have_text(re.compile(r"^46 tokens · \d+(\.\d)? m?s$"))


def test_a_stream_in_pieces_of_three_bytes_is_read_as_it_was_meant(page: Page, api: FakeApi) -> None:
    api.will(thinks("Größe: ∑ 🐜\n"), says("naïve → “12” 🐘"), ends(), piece=3)
    ask(page, "Count the 🐜")
    wait_for_answer(page)
    assert answers(page) == ["naïve → “12” 🐘"]
    assert api.asked[0].body["messages"][0]["content"] == "Count the 🐜"


def test_what_is_sent_is_what_was_chosen_and_nothing_else(page: Page, api: FakeApi) -> None:
    page.get_by_role("radio", name="high").check()
    ask(page, "Hello")
    wait_for_answer(page)
    assert api.asked[0].path == "/v1/chat/completions"
    assert api.asked[0].key is None
    assert api.asked[0].body == {
        "model": "nano",
        "stream": True,
        "stream_options": {"include_usage": True},
        "reasoning_effort": "high",
        "receipt": True,
        "messages": [{"role": "user", "content": "Hello"}],
    }


@pytest.mark.parametrize("by", ["button", "escape"])
def test_stop_ends_the_answer_and_keeps_what_was_said(page: Page, api: FakeApi, by: str) -> None:
    api.will(says("One, two"), threading.Event(), says(", three"))
    ask(page, "Count")
    page.get_by_text("One, two").wait_for()
    if by == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    page.get_by_text("Stopped.", exact=True).first.wait_for()
    assert answers(page) == ["One, two"]
    assert api.left.wait(5), "the server was not told"
    # The conversation goes on from there.
    ask(page, "Go on")
    wait_for_answer(page, 2)
    assert [message["content"] for message in api.asked[1].body["messages"]] == ["Count", "One, two", "Go on"]


def test_asking_again_keeps_both_answers(page: Page, api: FakeApi) -> None:
    api.will(says("first"), ends())
    api.will(says("second"), ends())
    ask(page, "A word")
    wait_for_answer(page)
    page.get_by_role("button", name="Answer again", exact=True).click()
    page.get_by_text("2 / 2").wait_for()
    wait_for_answer(page)
    assert answers(page) == ["second"]
    assert api.asked[0].body == api.asked[1].body
    page.get_by_role("button", name="Earlier answer").click()
    assert answers(page) == ["first"]
    # What is asked now follows the answer in view.
    ask(page, "And now?")
    wait_for_answer(page, 2)
    assert [message["content"] for message in api.asked[2].body["messages"]] == ["A word", "first", "And now?"]


def test_an_edited_question_begins_a_branch_of_its_own(page: Page, api: FakeApi) -> None:
    for reply in ("one", "two", "three"):
        api.will(says(reply), ends())
    ask(page, "First")
    wait_for_answer(page)
    ask(page, "Second")
    wait_for_answer(page, 2)
    page.get_by_role("button", name="Edit the question").first.click()
    editor = page.get_by_role("textbox", name="Question", exact=True)
    assert editor.evaluate("field => field === document.activeElement")
    editor.fill("First, put better")
    editor.press("Enter")
    page.get_by_text("three", exact=True).first.wait_for()
    wait_for_answer(page)
    assert questions(page) == ["First, put better"]
    assert answers(page) == ["three"]
    assert api.asked[2].body["messages"] == [{"role": "user", "content": "First, put better"}]
    page.get_by_role("button", name="Earlier question").click()
    assert questions(page) == ["First", "Second"]
    assert answers(page) == ["one", "two"]


def test_an_edit_may_be_given_up(page: Page) -> None:
    ask(page, "First")
    wait_for_answer(page)
    page.get_by_role("button", name="Edit the question").click()
    page.get_by_role("textbox", name="Question", exact=True).fill("Other")
    page.keyboard.press("Escape")
    assert questions(page) == ["First"]


def test_a_refusal_is_shown_with_its_message_and_can_be_tried_again(page: Page, api: FakeApi, watch: Watch) -> None:
    watch.allows_errors = True
    api.answers.append(refuses(429, "8 requests are waiting: try later.", **{"Retry-After": "7"}))
    ask(page, "Hello")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("8 requests are waiting: try later. Try again in 7 s.")
    api.will(says("Hello to you."), ends())
    alert.get_by_role("button", name="Try again").click()
    page.get_by_text("Hello to you.").first.wait_for()
    # A question that got no answer is not told to the model.
    page.get_by_role("button", name="Earlier answer").click()
    ask(page, "Once more")
    wait_for_answer(page, 2)
    assert api.asked[-1].body["messages"] == [{"role": "user", "content": "Once more"}]


def test_an_error_on_the_way_and_a_cut_connection_keep_what_came(page: Page, api: FakeApi) -> None:
    api.will(says("So far"), {"error": {"message": "the engine failed on this request"}})
    ask(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("the engine failed on this request")
    assert answers(page) == ["So far"]
    api.will(says("Half an ans"), is_cut=True)
    ask(page, "Again")
    page.get_by_text("The connection ended before the answer did.").wait_for()
    assert answers(page)[1] == "Half an ans"


def test_an_answer_at_the_limit_and_calls_of_functions(page: Page, api: FakeApi) -> None:
    api.will(says("Once upon a"), ends("length"))
    ask(page, "Tell me a story")
    page.get_by_text("It ended at the limit of tokens.").wait_for()
    calls = [
        {
            "choices": [
                {"delta": {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "add", "arguments": ""}}]}}
            ]
        },
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": 1,'}}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": ' "b": 2}'}}]}}]},
    ]
    api.will(calls, ends("tool_calls"))
    ask(page, "Add")
    page.get_by_text("Calls add").wait_for()
    expect(page.get_by_text('{"a": 1, "b": 2}')).to_be_visible()


def test_a_base_model_continues_the_text_alone(make_page: Callable[..., Page], api: FakeApi) -> None:
    api.models = [model("gpt2", is_base=True, has_thinking=False, efforts=[], tasks=[])]
    page = make_page()
    assert "it goes on with a text" in page.get_by_role("region", name="Start").inner_text()
    api.will([{"choices": [{"index": 0, "text": " *upon*"}]}, {"choices": [{"index": 0, "text": "\n a time"}]}])
    ask(page, "Once")
    wait_for_answer(page)
    assert page.locator(".continuation").text_content() == " *upon*\n a time"
    assert api.asked[0].path == "/v1/completions"
    assert api.asked[0].body == {
        "model": "gpt2",
        "prompt": "Once",
        "max_tokens": 256,
        "receipt": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    expect(page.get_by_role("radio")).to_have_count(0)


def test_no_server_and_then_there_is_one(make_page: Callable[..., Page], api: FakeApi, watch: Watch) -> None:
    watch.allows_errors = True
    page = make_page()
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")
    page.unroute("**/v1/models")
    page.get_by_role("button", name="Try again").click()
    page.get_by_role("region", name="Start").wait_for()


def test_the_thread_follows_unless_the_reader_has_scrolled_away(page: Page, api: FakeApi) -> None:
    first, second = threading.Event(), threading.Event()
    lines = says(*(f"line {number}\n\n" for number in range(60)))
    api.will(lines, first, says("near the end\n\n"), second, lines, ends())
    ask(page, "Many lines")
    page.get_by_text("line 59", exact=True).wait_for()
    page.wait_for_function(AT_THE_FOOT)
    page.get_by_text("line 30", exact=True).hover()
    page.mouse.wheel(0, -1200)
    page.get_by_role("button", name="To the end").wait_for()
    page.wait_for_function("() => document.querySelector('.thread').scrollTop === 0")
    first.set()
    page.get_by_text("near the end", exact=True).first.wait_for()
    assert page.evaluate("document.querySelector('.thread').scrollTop") == 0
    page.get_by_role("button", name="To the end").click()
    second.set()
    wait_for_answer(page)
    page.wait_for_function(AT_THE_FOOT)
