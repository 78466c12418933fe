"""Images for models that see: chosen, pasted, dropped."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from browser.fake_api import FakeApi, model
from browser.reading import ask, expect, wait_for_answer

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

# Puts files into what a paste or a drop brings, as the browser would.
_BRING = """(element, {name, type, data, padding, how}) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes, new Uint8Array(padding)], name, { type }));
  const options = { bubbles: true, cancelable: true };
  element.dispatchEvent(how === "drop"
    ? new DragEvent("drop", { ...options, dataTransfer: transfer })
    : new ClipboardEvent("paste", { ...options, clipboardData: transfer }));
}"""


def picture(colour: str) -> bytes:
    """A small PNG file."""
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(file, "PNG")
    return file.getvalue()


def upload(data: bytes, name: str = "a.png", kind: str = "image/png") -> dict[str, Any]:
    """A file for a file chooser."""
    return {"name": name, "mimeType": kind, "buffer": data}


def bring(page: Page, how: str, data: bytes, name: str = "a.png", kind: str = "image/png", padding: int = 0) -> None:
    """Paste or drop a file: `data`, and so many zeros."""
    content = {"name": name, "type": kind, "data": base64.b64encode(data).decode(), "padding": padding, "how": how}
    page.get_by_role("textbox", name="Your question").evaluate(_BRING, content)


@pytest.fixture
def seeing(make_page: Callable[..., Page], api: FakeApi) -> Page:
    """The page of a model that sees."""
    api.models = [model("qvq", sees_images=True, tasks=[]), model()]
    return make_page()


def test_images_are_sent_shown_and_kept(seeing: Page, api: FakeApi) -> None:
    with seeing.expect_file_chooser() as chooser:
        seeing.get_by_role("button", name="Add an image").click()
    chooser.value.set_files([upload(picture("red")), upload(picture("blue"), "b.png")])
    bring(seeing, "paste", picture("green"))
    bring(seeing, "drop", picture("yellow"))
    to_send = seeing.get_by_role("list", name="Images to send")
    expect(to_send.get_by_role("listitem")).to_have_count(4)
    to_send.get_by_role("button", name="Remove image 2").click()
    expect(to_send.get_by_role("listitem")).to_have_count(3)
    ask(seeing, "What is this?")
    wait_for_answer(seeing)
    expected = [
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{base64.b64encode(picture(colour)).decode()}"},
        }
        for colour in ("red", "green", "yellow")
    ]
    text = {"type": "text", "text": "What is this?"}
    assert api.asked[0].body["messages"] == [{"role": "user", "content": [*expected, text]}]
    expect(to_send).to_have_count(0)
    expect(seeing.locator(".question img")).to_have_count(3)
    seeing.reload()
    wait_for_answer(seeing)
    shown = seeing.locator(".question img")
    expect(shown).to_have_count(3)
    assert shown.first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 8


def test_an_image_alone_is_a_question(seeing: Page, api: FakeApi) -> None:
    bring(seeing, "paste", picture("red"))
    seeing.get_by_role("button", name="Send").click()
    wait_for_answer(seeing)
    [message] = api.asked[0].body["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url"]
    expect(seeing.get_by_role("link", name="An image")).to_be_visible()


def test_what_cannot_be_sent_is_said(seeing: Page) -> None:
    notice = seeing.locator(".notice")
    bring(seeing, "drop", b"%PDF", "paper.pdf", "application/pdf")
    expect(notice).to_contain_text("paper.pdf is no image that can be sent: expected PNG, JPEG, WebP or GIF.")
    bring(seeing, "drop", b"\0", "huge.png", padding=8 * 1024 * 1024)
    expect(notice).to_contain_text("huge.png is too large: expected at most 8 MB; make it smaller.")
    expect(seeing.get_by_role("list", name="Images to send")).to_have_count(0)


def test_a_model_that_does_not_see_says_so(page: Page) -> None:
    expect(page.get_by_role("button", name="Add an image")).to_have_count(0)
    bring(page, "paste", picture("red"))
    expect(page.locator(".notice")).to_contain_text("nano does not see images: choose a model that does.")


def test_text_is_pasted_as_ever(seeing: Page) -> None:
    field = seeing.get_by_role("textbox", name="Your question")
    seeing.evaluate("navigator.clipboard.writeText('some text')")
    field.press("Control+V")
    expect(field).to_have_value("some text")
