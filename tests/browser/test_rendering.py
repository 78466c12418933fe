"""What a model says, on the page: markdown, code, maths; and text that would like to be more than text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from browser.conftest import Watch
from browser.fake_api import FakeApi, ends, says, thinks
from browser.reading import ask, expect, wait_for_answer

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = pytest.mark.browser

HOSTILE = [
    "<script>window.harm = 1</script>",
    "<img src=x onerror='window.harm = 2'>",
    "<svg onload=window.harm=3><animate onbegin=window.harm=4 attributeName=x dur=1s></svg>",
    '<iframe srcdoc="<script>parent.harm = 5</script>"></iframe>',
    '<a href="javascript:window.harm=6">raw</a>',
    "[click](javascript:window.harm=7) [spaced]( java&#115;cript:window.harm=8 )",
    "[data](data:text/html,<script>harm=9</script>)",
    "[mixed](JaVaScRiPt&colon;window.harm=10) <javascript:window.harm=11>",
    "![picture](http://127.0.0.1:9/pixel.png?said=secret) ![local](/v1/models)",
    '<style>body { display: none }</style><link rel=stylesheet href="http://127.0.0.1:9/x.css">',
    '<form action="http://127.0.0.1:9/"><button formaction="javascript:window.harm=12">go</button></form>',
    '<div style="position:fixed;inset:0">cover</div><base href="http://127.0.0.1:9/">',
    "<meta http-equiv=refresh content=0>",
    "$\\href{javascript:window.harm=13}{x}$ $\\includegraphics{http://127.0.0.1:9/y.png}$",
    "$\\htmlStyle{position:fixed}{z}$ $\\htmlId{question}{w}$",
    '$" onmouseover="window.harm=14$ and $</span><script>window.harm=15</script>$',
    '```html" onclick="window.harm=16\n</code></pre><script>window.harm = 17</script>\n```',
    "| a |\n| --- |\n| <img src=x onerror=window.harm=18> |",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.harm=19></style></mglyph></table></mtext></math>",
    '<details open ontoggle="window.harm=20"><summary>s</summary></details><sub onclick="window.harm=21">sub</sub>',
    "[ref]: javascript:window.harm=22\n\n[ref]",
]


def show(page: Page, api: FakeApi, text: str) -> Locator:
    """The answer that says so."""
    number = page.locator(".answer").count() + 1
    api.will(says(text), ends())
    ask(page, "Show it")
    wait_for_answer(page, number)
    return page.locator(".answer").last.locator(".prose")


def test_markdown_is_laid_out(page: Page, api: FakeApi) -> None:
    prose = show(
        page,
        api,
        "# Title\n\nSome *light*, **bold** and `code`\nnext line; H<sub>2</sub>O, 2 < 3 & 4 > 1.\n\n"
        "1. one\n2. two\n   - inner\n\n> quoted\n\n| a | b |\n| --- | ---: |\n| 1 | 2 |\n\n- [x] done\n- [ ] open\n\n"
        "[link](https://example.org/a?b=c&d) ~~gone~~\n\n---\n",
    )
    expect(prose.get_by_role("heading", name="Title")).to_be_visible()
    expect(prose.locator("p").first).to_have_text("Some light, bold and codenext line; H2O, 2 < 3 & 4 > 1.")
    assert prose.locator("em, strong, p code, sub, del").all_inner_texts() == ["light", "bold", "code", "2", "gone"]
    expect(prose.locator("p br")).to_have_count(1)
    expect(prose.locator("ol > li ul > li")).to_have_text("inner")
    expect(prose.locator("blockquote")).to_have_text("quoted")
    assert prose.locator("th, td").all_inner_texts() == ["a", "b", "1", "2"]
    expect(prose.locator("td").nth(1)).to_have_attribute("align", "right")
    assert prose.locator("ul > li").all_inner_texts()[-2:] == ["☑ done", "☐ open"]
    link = prose.get_by_role("link", name="link")
    expect(link).to_have_attribute("href", "https://example.org/a?b=c&d")
    expect(link).to_have_attribute("rel", "noopener noreferrer")
    expect(link).to_have_attribute("target", "_blank")


def test_code_is_copied_to_the_letter(page: Page, api: FakeApi) -> None:
    code = "def f(a):\n    return a < 1 && '<b>'\n"
    prose = show(page, api, f"So:\n\n```python\n{code}```\n\n- in a list:\n\n  ```\n  plain\n  ```\n")
    expect(prose.locator(".code-language").first).to_have_text("python")
    copy = prose.get_by_role("button", name="Copy the code")
    copy.first.click()
    expect(copy.first).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == code
    copy.nth(1).click()
    expect(copy.nth(1)).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "plain\n"


def test_the_answer_is_copied_as_it_was_said(page: Page, api: FakeApi) -> None:
    show(page, api, "**12** is $3 \\cdot 4$")
    page.get_by_role("button", name="Copy the answer").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "**12** is $3 \\cdot 4$"


def test_maths_are_set_and_prices_are_not(page: Page, api: FakeApi) -> None:
    prose = show(
        page,
        api,
        "Inline $a_1 + b_2$ and \\(x^2\\), *at once*: $$\\sqrt{\\frac{a}{b}}$$\n\n"
        "\\[\\left(\\begin{matrix}1\\\\2\\\\3\\\\4\\end{matrix}\\right) \\vec{v} \\fcolorbox{red}{white}{x}\\]\n\n"
        "It costs $5 and $6, or $x < y$. Wrong: $\\frac{1$. Code: `$n$`.",
    )
    expect(prose.locator(".katex")).to_have_count(5)
    expect(prose.locator(".katex-display")).to_have_count(2)
    assert prose.locator("annotation").all_text_contents() == [
        "a_1 + b_2",
        "x^2",
        "\\sqrt{\\frac{a}{b}}",
        "\\left(\\begin{matrix}1\\\\2\\\\3\\\\4\\end{matrix}\\right) \\vec{v} \\fcolorbox{red}{white}{x}",
        "x < y",
    ]
    expect(prose.locator("p").last).to_contain_text("It costs $5 and $6, or")
    expect(prose.locator("p").last).to_contain_text("Wrong: ")
    expect(prose.locator("p").last).to_contain_text("\\frac{1")
    expect(prose.locator("p code")).to_have_text("$n$")
    # Letters come from KaTeX's own fonts, and what it stretches is as wide as it says.
    fonts = page.evaluate("[...document.fonts].filter(font => font.status === 'loaded').map(font => font.family)")
    assert any(font.strip('"').startswith("KaTeX") for font in fonts)
    widths = prose.locator(".katex-html svg[width]").evaluate_all("all => all.map(svg => svg.style.width)")
    assert [width for width in widths if width], "a style that the policy forbids has been set by script"


def test_maths_grow_while_they_stream(page: Page, api: FakeApi) -> None:
    api.will(says("So ", "$\\frac", "{1}", "{2}", "$", " holds, and $$\\sum_{i}", " i$$", " ends it."), ends())
    ask(page, "Show it")
    wait_for_answer(page)
    prose = page.locator(".prose")
    assert prose.locator("annotation").all_text_contents() == ["\\frac{1}{2}", "\\sum_{i} i"]
    expect(prose).to_contain_text("ends it.")


def test_hostile_text_runs_nothing(page: Page, api: FakeApi) -> None:
    for text in HOSTILE:
        check_harmless(page, api, text)


def test_all_hostile_texts_at_once_letter_by_letter_and_after_a_reload(page: Page, api: FakeApi) -> None:
    text = "\n\n".join(HOSTILE)
    api.will(thinks(*HOSTILE), [event for part in text.split(" ") for event in says(f"{part} ")], ends())
    ask(page, text)
    wait_for_answer(page)
    page.get_by_role("button", name="Thought for").click()
    check_page(page)
    page.reload()
    wait_for_answer(page)
    check_page(page)


def test_hostile_text_runs_nothing_even_without_the_policy(
    make_page: Callable[..., Page], api: FakeApi, watch: Watch
) -> None:
    page = make_page(bypass_csp=True)
    check_harmless(page, api, "\n\n".join(HOSTILE))


def check_harmless(page: Page, api: FakeApi, text: str) -> None:
    """Show a text, and press everything in it."""
    prose = show(page, api, text)
    check_page(page)
    for link in prose.get_by_role("link").all():
        address = link.get_attribute("href") or ""
        assert address.startswith(("http://", "https://", "mailto:")), (address, text)
    # Links lead away, which is their right; what else answers to a click or a pointer must not.
    for event in ("click", "mouseover", "toggle"):
        prose.locator(":not(a)").evaluate_all(
            "(all, event) => all.forEach((it) => it.dispatchEvent(new Event(event)))", event
        )
    assert page.evaluate("window.harm") is None, text


def check_page(page: Page) -> None:
    """No harm done, and nothing on the page that could do any."""
    page.wait_for_timeout(50)  # time for an image to fail to load
    assert page.evaluate("window.harm") is None
    found = page.evaluate(
        """() => [...document.querySelectorAll(".thread *")].flatMap((element) => [
          ...(/^(script|iframe|object|embed|form|style|link|base|meta|img|details|svg:animate)$/i.test(element.tagName)
            ? [element.tagName] : []),
          ...[...element.attributes].filter(({ name, value }) =>
            /^on/i.test(name) || /^\\s*(javascript|data):/i.test(value)).map(({ name }) => name),
        ])"""
    )
    assert found == []
    assert page.evaluate("getComputedStyle(document.body).display") == "block"


def test_hostile_text_is_shown_as_the_text_it_is(page: Page, api: FakeApi) -> None:
    prose = show(page, api, "Say <script>alert(1)</script> and <b onclick='x'>bold</b>.\n\n<div>\nblock\n</div>")
    expect(prose.locator("p").first).to_have_text("Say <script>alert(1)</script> and <b onclick='x'>bold.")
    expect(prose).to_contain_text("<div>\nblock\n</div>")


def test_thinking_is_shown_to_the_letter(page: Page, api: FakeApi) -> None:
    api.will(thinks("1*3=3 *and* <b>2</b>\n  $x$\n"), says("3"), ends())
    ask(page, "Show it")
    wait_for_answer(page)
    page.get_by_role("button", name="Thought for").click()
    assert page.locator(".working p").text_content() == "1*3=3 *and* <b>2</b>\n  $x$\n"
