"""The page for everybody: keyboard, screen reader, narrow and dark screens, little motion."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from browser.conftest import DESKTOP, NARROW, Watch
from browser.fake_api import FakeApi, ends, model, refuses, says, thinks, usage
from browser.reading import answers, ask, expect, wait_for_answer
from browser.test_settings import RECEIPT, spoken, token

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

AXE = Path(__file__).parents[2] / "web" / "node_modules" / "axe-core" / "axe.min.js"
RICH = """\
Every common divisor of $a$ and $b$ divides $a - b$ as well, so

$$\\gcd(a, b) = \\gcd(b, a \\bmod b), \\qquad \\sqrt{a^2 + b^2} \\ge \\frac{a + b}{\\sqrt 2}$$

Euclid's algorithm repeats that until one number is **zero**:

```python
def gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a  # never more steps than five for each decimal digit of the smaller of the two numbers that were given
```

| step | a | b |
| --- | ---: | ---: |
| 1 | 84 | 36 |
| 2 | 36 | 12 |

See [Lamé's proof](https://example.org/) of 1844.
"""


def walk(page: Page, api: FakeApi) -> Iterator[str]:
    """Goes through what the page can show, and names each state."""
    is_narrow = page.viewport_size == NARROW
    yield "start"
    api.will(thinks("48-63=84\n" * 40), says("12"), ends(usage=usage(52, 41, 38), receipt=RECEIPT))
    page.locator(".example").first.click()
    wait_for_answer(page)
    page.get_by_role("button", name="Thought for").click()
    yield "thinking"
    page.get_by_role("button", name="Receipt").click()
    yield "receipt"
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Thought for").click()
    api.will(thinks("They ask why."), says(RICH), ends(usage=usage(90, 310, 14), receipt=RECEIPT))
    ask(page, "Why does this work? Show it in Python too.")
    wait_for_answer(page, 2)
    page.locator(".katex").first.wait_for()
    yield "answer"
    page.get_by_role("button", name="Edit the question").first.click()
    yield "edit"
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Answer in one line.")
    page.get_by_label("Temperature").fill("3")
    yield "settings"
    page.get_by_label("Temperature").fill("")
    page.keyboard.press("Escape")
    api.will(
        spoken(
            "content", token("The", 0.99), token(" sum", 0.6, (" answer", 0.3)), token(" is", 0.4), token(" 12", 0.1)
        ),
        ends(),
    )
    ask(page, "And with probabilities?")
    wait_for_answer(page, 3)
    page.get_by_role("button", name="Token probabilities", exact=True).click()
    page.get_by_role("option").nth(1).hover()
    yield "tokens"
    page.mouse.move(0, 0)
    api.answers.append(refuses(400, "the prompt has 600 tokens and the model's context is 512: shorten the prompt"))
    page.get_by_role("button", name="Answer again", exact=True).last.click()
    page.get_by_role("alert").wait_for()
    yield "refusal"
    if is_narrow:
        page.get_by_role("button", name="Open the contents").click()
    page.locator(".entry .menu button").first.click()
    page.get_by_role("menu").wait_for()
    yield "contents"
    page.get_by_role("menuitem", name="Delete").click()
    page.get_by_role("button", name="Undo").click(trial=True)  # nothing lies over it
    yield "notice"


LOOKS = {
    "light": {"viewport": DESKTOP, "color_scheme": "light"},
    "dark": {"viewport": DESKTOP, "color_scheme": "dark"},
    "narrow": {"viewport": NARROW, "color_scheme": "light", "has_touch": True},
    "narrow-dark": {"viewport": NARROW, "color_scheme": "dark", "has_touch": True},
}


@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_no_fault_and_nothing_sticks_out(
    make_page: Callable[..., Page], api: FakeApi, watch: Watch, shoot: Callable[[Page, str], Path], look: str
) -> None:
    assert AXE.exists(), "run `make test-browser`, which installs axe-core, or `npm ci` in web/"
    watch.allows_errors = True
    page = make_page(**LOOKS[look], bypass_csp=True)
    page.add_script_tag(path=AXE)
    faults: list[Any] = []
    for state in walk(page, api):
        shoot(page, f"{look}-{state}")
        found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
        faults += [
            (state, each["impact"], each["id"], [(node["html"], node["failureSummary"]) for node in each["nodes"]])
            for each in found
        ]
        widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1], f"{state} is wider than the screen"
    assert not faults, json.dumps(faults, indent=1)


def test_the_page_is_used_by_keyboard_alone(page: Page, api: FakeApi) -> None:
    field = page.get_by_role("textbox", name="Your question")
    expect(field).to_be_focused()
    skip = page.get_by_role("link", name="Skip to the question")
    assert skip.evaluate("it => it === document.querySelector('a, button, input, textarea')"), "it comes first"
    expect(skip).not_to_be_in_viewport()
    skip.focus()
    expect(skip).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(field).to_be_focused()
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    expect(field).to_have_value("first line\nsecond line")
    assert api.asked == []
    page.keyboard.press("Enter")
    wait_for_answer(page)
    assert api.asked[0].body["messages"][0]["content"] == "first line\nsecond line"
    expect(field).to_be_focused()
    expect(field).to_have_value("")

    settings = page.get_by_role("button", name="Settings")
    settings.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Settings")
    for _ in range(20):  # more than there are fields: the focus stays inside
        page.keyboard.press("Tab")
        assert dialog.evaluate("it => it.contains(document.activeElement) || document.activeElement === document.body")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    expect(settings).to_be_focused()

    menu = page.get_by_role("button", name="More for first line second line")
    menu.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("menuitem", name="Rename")).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("menuitem", name="Delete")).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("menuitem", name="Export as JSON")).to_be_focused()
    page.keyboard.press("Escape")
    expect(menu).to_be_focused()
    expect(page.get_by_role("menu")).to_have_count(0)


def test_what_has_the_focus_shows_it(page: Page) -> None:
    ask(page, "Hello")
    wait_for_answer(page)
    seen = set()
    for _ in range(16):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            continue  # between the last and the first
        name, outline = page.evaluate(
            """() => {
              const it = document.activeElement;
              const marked = it.type === "radio" ? it.nextElementSibling : it.id === "question" ? it.form : it;
              const { outlineStyle, boxShadow } = getComputedStyle(marked);
              return [it.getAttribute("aria-label") ?? it.textContent, it.id === "question" ? boxShadow : outlineStyle];
            }"""
        )
        assert outline != "none", name
        seen.add(name)
    assert {"Settings", "Edit the question", "Copy the answer", "Receipt", "Your question"} <= seen


def test_enter_that_chooses_a_character_sends_nothing(page: Page, api: FakeApi) -> None:
    field = page.get_by_role("textbox", name="Your question")
    field.fill("にほん")
    field.evaluate(
        "it => it.dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true }))"
    )
    expect(field).to_have_value("にほん")
    assert api.asked == []


def test_escape_closes_what_is_open_before_it_stops_an_answer(page: Page, api: FakeApi) -> None:
    api.will(says("One"), threading.Event(), ends())
    ask(page, "Count")
    page.get_by_text("One", exact=True).wait_for()
    page.get_by_role("button", name="Settings").click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
    page.keyboard.press("Escape")
    wait_for_answer(page)
    assert answers(page) == ["One"]


def test_a_screen_reader_is_told_whole_sentences_once(page: Page, api: FakeApi) -> None:
    first, second = threading.Event(), threading.Event()
    api.will(
        thinks("hm"), first, says("It is **12"), says("**. "), says("As 84 is"), second, says(" 7 times `12`."), ends()
    )
    ask(page, "gcd")
    log = page.get_by_role("log")
    expect(log).to_have_attribute("aria-live", "polite")
    expect(log.locator("p")).to_have_text(["Thinking."])
    first.set()
    expect(log.locator("p")).to_have_text(["Thinking.", "It is 12."])
    second.set()
    expect(log.locator("p")).to_have_text(["Thinking.", "It is 12.", "As 84 is 7 times 12."])
    ask(page, "Again")
    expect(log.locator("p")).to_have_text(["Well."])


def test_at_360_pixels_the_contents_are_a_drawer(make_page: Callable[..., Page], api: FakeApi) -> None:
    page = make_page(viewport=NARROW)
    contents = page.get_by_role("navigation", name="Conversations")
    expect(contents).to_be_hidden()
    ask(page, "First")
    wait_for_answer(page)
    opener = page.get_by_role("button", name="Open the contents")
    opener.click()
    expect(contents).to_be_visible()
    page.keyboard.press("Escape")
    expect(contents).to_be_hidden()
    opener.click()
    page.get_by_role("button", name="New conversation").click()
    expect(contents).to_be_hidden()
    opener.click()
    page.get_by_role("link", name="First").click()
    expect(contents).to_be_hidden()
    assert answers(page) == ["Well."]


def test_the_theme_follows_the_system_until_one_is_chosen(make_page: Callable[..., Page]) -> None:
    page = make_page(color_scheme="dark")

    def is_dark() -> bool:
        return bool(page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 23)")

    assert is_dark()
    page.emulate_media(color_scheme="light")
    assert not is_dark()
    page.get_by_role("button", name="Theme: system").click()
    page.get_by_role("button", name="Theme: light").click()
    expect(page.get_by_role("button", name="Theme: dark")).to_be_visible()
    assert is_dark()
    page.reload(wait_until="commit")
    page.locator("body").wait_for()
    assert is_dark(), "it holds from the first paint"
    page.get_by_role("button", name="Theme: dark").click()
    assert not is_dark()


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_nothing_moves_for_those_who_want_it_so(make_page: Callable[..., Page], api: FakeApi, motion: str) -> None:
    page = make_page(reduced_motion=motion)
    api.will(thinks("hm"), threading.Event(), ends())
    ask(page, "Think")
    page.locator(".thinking-fold").wait_for()
    moving = page.evaluate("document.getAnimations().some(it => it.playState === 'running')")
    assert moving == (motion == "no-preference")


def test_the_first_visit_loads_little_and_maths_only_when_needed(page: Page, api: FakeApi, watch: Watch) -> None:
    sizes = page.evaluate(
        "performance.getEntriesByType('resource').filter(it => !it.name.includes('/v1/')).map(it => it.encodedBodySize)"
    )
    assert 50_000 < sum(sizes) < 350_000
    assert not [url for url in watch.requests if "typeset" in url]
    api.will(says("$x$"), ends())
    ask(page, "Maths")
    page.locator(".katex").wait_for()
    assert [url for url in watch.requests if "typeset" in url]


def test_a_long_answer_streams_without_blocking_the_page(page: Page, api: FakeApi) -> None:
    api.models = [model()]
    text = RICH.replace("$", "").split(" ")
    api.will([event for _ in range(20) for word in text for event in says(f"{word} ")], ends())
    page.evaluate(
        """() => {
          window.longest = 0;
          new PerformanceObserver((list) => {
            for (const { duration } of list.getEntries()) longest = Math.max(longest, duration);
          }).observe({ type: "longtask" });
        }"""
    )
    ask(page, "A long one")
    page.set_default_timeout(60_000)
    wait_for_answer(page)
    assert page.locator(".prose .code").count() == 20
    assert page.evaluate("window.longest") < 1000, "milliseconds"
