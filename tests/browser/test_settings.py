"""Models, adapters, sampling, system prompt, keys, probabilities, receipts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from browser.conftest import Watch
from browser.fake_api import Event, FakeApi, delta, ends, model, says
from browser.reading import ask, expect, wait_for_answer

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = pytest.mark.browser

RECEIPT = {
    "version": 1,
    "model": "nano",
    "weights": "3f5c" * 16,
    "adapter": None,
    "profile": "exact",
    "prompt_ids": list(range(28)),
    "sampling": {"temperature": 0.0, "seed": 17, "stop": []},
    "output_ids": [5, 7, 1],
    "digest": "9ab0" * 16,
}


def open_settings(page: Page) -> Locator:
    """The panel."""
    page.get_by_role("button", name="Settings").click()
    return page.get_by_role("dialog", name="Settings")


def token(text: str, probability: float, *others: tuple[str, float]) -> dict[str, Any]:
    """A token's entry in `logprobs`."""
    tops = [(text, probability), *others]
    ordered = sorted(tops, key=lambda top: -top[1])
    top_logprobs = [{"token": other, "logprob": math.log(share), "bytes": None} for other, share in ordered]
    return {"token": text, "logprob": math.log(probability), "bytes": None, "top_logprobs": top_logprobs}


def spoken(kind: str, *tokens: dict[str, Any]) -> list[Event]:
    """Events with one token each; kind is "reasoning" or "content"."""
    key = "reasoning_content" if kind == "reasoning" else "content"
    return [delta(logprobs={kind: [each]}, **{key: each["token"]}) for each in tokens]


def test_sampling_parameters_are_sent_as_entered(page: Page, api: FakeApi) -> None:
    panel = open_settings(page)
    panel.get_by_label("System prompt").fill("Answer in one word.")
    values = {
        "Temperature": "0.7", "Top-p": ".9", "Top-k": "40", "Min-p": "0.05", "Most tokens": "300",
        "Thinking budget": "64", "Seed": "17",
    }  # fmt: skip
    for label, value in values.items():
        panel.get_by_label(label).fill(value)
    panel.get_by_label("Stop strings").fill("END\n\\n\\n")
    page.keyboard.press("Escape")
    ask(page, "Hello")
    wait_for_answer(page)
    body = api.asked[0].body
    sent = {name: body[name] for name in body.keys() - {"model", "stream", "stream_options", "messages"}}
    assert sent == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "max_tokens": 300,
        "thinking_budget": 64,
        "seed": 17,
        "stop": ["END", "\n\n"],
        "reasoning_effort": "medium",
        "receipt": True,
    }
    assert body["messages"][0] == {"role": "system", "content": "Answer in one word."}
    # The next conversation is made with the same sampling, but without the system prompt; and so after a reload.
    page.get_by_role("button", name="New conversation").click()
    page.reload()
    ask(page, "Hello")
    wait_for_answer(page)
    assert api.asked[1].body == body | {"messages": [{"role": "user", "content": "Hello"}]}
    open_settings(page).get_by_role("button", name="Back to the model's own").click()
    page.keyboard.press("Escape")
    ask(page, "Hello again")
    wait_for_answer(page, 2)
    assert "temperature" not in api.asked[2].body
    assert "stop" not in api.asked[2].body


@pytest.mark.parametrize(
    ("label", "given", "expected"),
    [
        ("Temperature", "3", "Expected a number from 0 to 2"),
        ("Top-p", "0", "Expected a number from 0.01 to 1"),
        ("Top-k", "2.5", "Expected a whole number, 0 or more"),
        ("Seed", "abc", "Expected a whole number, 0 or more"),
    ],
)
def test_a_wrong_value_is_named_and_nothing_is_sent(
    page: Page, api: FakeApi, label: str, given: str, expected: str
) -> None:
    panel = open_settings(page)
    field = panel.get_by_label(label)
    field.fill(given)
    expect(field).to_have_accessible_description(expected)
    expect(field).to_have_attribute("aria-invalid", "true")
    page.keyboard.press("Escape")
    ask(page, "Hello")
    expect(panel).to_be_visible()
    assert api.asked == []
    field.fill("1")
    expect(field).to_have_attribute("aria-invalid", "false")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Send").click()
    wait_for_answer(page)
    assert len(api.asked) == 1


def test_models_and_adapters_are_chosen(make_page: Callable[..., Page], api: FakeApi) -> None:
    api.models = [
        model(),
        model("smollm2", has_thinking=False, efforts=[], tasks=[], adapters=["sql", "legal"]),
        model("smollm2:sql", tasks=[]) | {"parent": "smollm2"},
        model("smollm2:legal", tasks=[]) | {"parent": "smollm2"},
    ]
    page = make_page()
    choice = page.get_by_role("combobox", name="Model")
    assert choice.get_by_role("option").all_inner_texts() == ["nano", "smollm2"]
    expect(page.get_by_role("combobox", name="Adapter")).to_have_count(0)
    choice.select_option("smollm2")
    expect(page.get_by_role("group", name="Effort")).to_have_count(0)
    ask(page, "Without")
    wait_for_answer(page)
    page.get_by_role("combobox", name="Adapter").select_option("sql")
    ask(page, "With")
    wait_for_answer(page, 2)
    assert [request.body["model"] for request in api.asked] == ["smollm2", "smollm2:sql"]
    assert "reasoning_effort" not in api.asked[0].body
    expect(page.get_by_role("article", name="Answer of smollm2 + sql")).to_be_visible()
    panel = open_settings(page)
    expect(panel.get_by_label("Thinking budget")).to_have_count(0)
    expect(panel).to_contain_text("Context of 512 tokens, profile exact.")
    panel.get_by_role("combobox", name="Model").select_option("nano")
    page.keyboard.press("Escape")
    ask(page, "Nano")
    wait_for_answer(page, 3)
    assert api.asked[2].body["model"] == "nano"


def test_effort_names_only_what_the_model_tells_apart(make_page: Callable[..., Page], api: FakeApi) -> None:
    api.models = [model("qwen3", efforts=["low", "medium"], tasks=[])]
    page = make_page()
    group = page.get_by_role("group", name="Effort")
    assert group.get_by_role("radio").count() == 2
    page.keyboard.press("Tab")
    group.get_by_role("radio", name="low").check()
    ask(page, "Hello")
    wait_for_answer(page)
    assert api.asked[0].body["reasoning_effort"] == "low"


def test_token_probabilities_on_hover_and_by_keyboard(page: Page, api: FakeApi) -> None:
    ask(page, "Hello")
    wait_for_answer(page)
    api.will(
        spoken("reasoning", token("48", 0.9), token("-63", 0.5, ("-36", 0.4))),
        spoken(
            "content", token("The", 0.999), token(" answer", 0.3, (" result", 0.6)), token("\n", 0.0004, ("!", 0.9))
        ),
        ends(),
    )
    page.get_by_role("button", name="Answer again with token probabilities").click()
    page.get_by_text("2 / 2").wait_for()
    wait_for_answer(page)
    assert api.asked[0].body.keys() | {"logprobs", "top_logprobs"} == api.asked[1].body.keys()
    assert (api.asked[1].body["logprobs"], api.asked[1].body["top_logprobs"]) == (True, 5)

    tokens = page.get_by_role("listbox", name="Tokens of the answer").get_by_role("option")
    assert tokens.evaluate_all("all => all.map(it => it.getAttribute('aria-label'))") == [
        "The, 99.9%",
        "␣answer, 30.0%",
        "⏎, under 0.1%",
    ]
    doubts = tokens.evaluate_all("all => all.map(it => getComputedStyle(it).backgroundColor)")
    assert len(set(doubts)) == 3, "each is tinted by how unlikely it was"
    tokens.nth(1).hover()
    card = page.locator(".alternatives")
    expect(card).to_be_visible()
    assert card.locator(".alternative").all_inner_texts() == ["␣result\n60.0%", "␣answer\n30.0%"]
    page.mouse.move(0, 0)
    expect(card).to_have_count(0)

    page.get_by_role("listbox", name="Tokens of the answer").focus()
    expect(card).to_contain_text("The")
    page.keyboard.press("End")
    expect(card).to_contain_text("!")
    expect(tokens.nth(2)).to_have_attribute("aria-selected", "true")
    page.keyboard.press("ArrowLeft")
    expect(card).to_contain_text("result")

    page.get_by_role("button", name="Thought for").click()
    thoughts = page.get_by_role("listbox", name="Tokens of the thinking").get_by_role("option")
    assert thoughts.all_inner_texts() == ["48", "-63"]
    page.get_by_role("button", name="Token probabilities", exact=True).click()
    assert page.locator(".answer > .prose").inner_text() == "The answer"


def test_the_switch_asks_for_probabilities_of_a_base_model_too(make_page: Callable[..., Page], api: FakeApi) -> None:
    api.models = [model("gpt2", is_base=True, has_thinking=False, efforts=[], tasks=[])]
    page = make_page()
    open_settings(page).get_by_role("checkbox", name="Token probabilities").check()
    page.keyboard.press("Escape")
    logprobs = {
        "tokens": [" upon"],
        "token_logprobs": [math.log(0.5)],
        "top_logprobs": [{" upon": math.log(0.5), " again": math.log(0.25)}],
    }
    api.will([{"choices": [{"index": 0, "text": " upon", "logprobs": logprobs}]}])
    ask(page, "Once")
    wait_for_answer(page)
    assert api.asked[0].body["logprobs"] == 5
    page.get_by_role("button", name="Token probabilities", exact=True).click()
    page.get_by_role("option", name="␣upon, 50.0%").hover()
    expect(page.locator(".alternatives")).to_contain_text("␣again")


def test_the_receipt_shows_what_recomputing_takes(page: Page, api: FakeApi) -> None:
    api.will(says("12"), ends(receipt=RECEIPT))
    ask(page, "gcd")
    wait_for_answer(page)
    page.get_by_role("button", name="Receipt").click()
    dialog = page.get_by_role("dialog", name="Receipt")
    expect(dialog).to_contain_text("openbook verify receipt.json")
    lines = dict(zip(dialog.locator("dt").all_inner_texts(), dialog.locator("dd").all_inner_texts(), strict=True))
    assert lines == {
        "version": "1",
        "model": "nano",
        "weights": RECEIPT["weights"],
        "profile": "exact",
        "prompt_ids": "0 1 2 3 4 5 6 7 … (28 in all)",
        "sampling.temperature": "0",
        "sampling.seed": "17",
        "output_ids": "5 7 1",
        "digest": RECEIPT["digest"],
    }
    dialog.get_by_role("button", name="Copy as JSON").click()
    expect(dialog.get_by_role("button", name="Copied")).to_be_visible()
    assert json.loads(page.evaluate("navigator.clipboard.readText()")) == RECEIPT
    with page.expect_download() as download:
        dialog.get_by_role("button", name="Download receipt.json").click()
    assert download.value.suggested_filename == "receipt.json"
    assert json.loads(download.value.path().read_text()) == RECEIPT
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    expect(page.get_by_role("button", name="Receipt")).to_be_focused()


def test_an_answer_without_a_receipt_says_why(make_page: Callable[..., Page], api: FakeApi) -> None:
    api.models = [model("smollm2", profile="fast", tasks=[])]
    page = make_page()
    ask(page, "Hello")
    wait_for_answer(page)
    page.get_by_role("button", name="Receipt").click()
    dialog = page.get_by_role("dialog", name="Receipt")
    assert "receipt" not in api.asked[0].body
    expect(dialog).to_contain_text("This answer has no receipt.")
    expect(dialog).to_contain_text("served in the profile fast")
    expect(dialog).to_contain_text("openbook serve --profile exact")


def test_a_key_is_asked_for_kept_sent_and_forgotten(make_page: Callable[..., Page], api: FakeApi, watch: Watch) -> None:
    watch.allows_errors = True
    api.api_key = "sesame"
    page = make_page()
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_contain_text("This server asks for a key.")
    page.keyboard.press("Escape")
    expect(page.get_by_role("alert")).to_contain_text("the API key is missing or wrong")
    page.get_by_role("button", name="Try again").click()
    dialog.get_by_label("API key").fill("wrong")
    dialog.get_by_role("button", name="Enter").click()
    expect(dialog).to_contain_text("The server does not take this key.")
    dialog.get_by_label("API key").fill("sesame")
    dialog.get_by_role("button", name="Enter").click()
    expect(dialog).to_have_count(0)
    page.reload()
    ask(page, "Hello")
    wait_for_answer(page)
    assert api.asked[0].key == "Bearer sesame"
    open_settings(page).get_by_role("button", name="Forget the key").click()
    expect(dialog).to_contain_text("This server asks for a key.")
    assert page.evaluate("localStorage.getItem('openbook.api-key')") is None


def test_a_key_that_is_no_longer_taken_is_asked_for_anew(page: Page, api: FakeApi, watch: Watch) -> None:
    watch.allows_errors = True
    api.api_key = "sesame"
    ask(page, "Hello")
    dialog = page.get_by_role("dialog", name="API key")
    dialog.get_by_label("API key").fill("sesame")
    dialog.get_by_role("button", name="Enter").click()
    page.get_by_role("button", name="Try again").click()
    page.get_by_text("2 / 2").wait_for()
    wait_for_answer(page)
    expect(page.locator(".answer")).to_contain_text("Well.")


def test_settings_of_one_conversation_leave_the_others_alone(page: Page, api: FakeApi) -> None:
    ask(page, "One")
    wait_for_answer(page)
    page.get_by_role("button", name="New conversation").click()
    page.get_by_role("radio", name="high").check()
    ask(page, "Two")
    wait_for_answer(page)
    page.get_by_role("link", name=re.compile("One")).click()
    expect(page.get_by_role("radio", name="medium")).to_be_checked()
