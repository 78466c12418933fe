"""How a problem is put to a model, and where in its reply the answer stands."""

from __future__ import annotations

import re
from typing import Literal

from openbook.engine.model import Message, Model

PromptStyle = Literal["bare", "answer-tags"]
PROMPT_STYLES: tuple[PromptStyle, ...] = ("bare", "answer-tags")


def default_style(model: Model) -> PromptStyle:
    """Our models speak the bare answer behind their thinking; any other is told to put it between tags."""
    return "bare" if model.is_openbook else "answer-tags"


def conversation(question: str, style: PromptStyle) -> list[Message]:
    """The messages that put a question: the question alone, or behind reasoning-gym's published system prompt."""
    user: Message = {"role": "user", "content": question}
    if style == "bare":
        return [user]
    from reasoning_gym.utils import SYSTEM_PROMPTS

    return [{"role": "system", "content": SYSTEM_PROMPTS["default"]}, user]


def extract_answer(text: str, style: PromptStyle) -> str | None:
    """The answer in a reply from which the thinking is cut already; None if there is none.

    With tags it is what the last pair of them holds, as in `reasoning_gym.utils.extract_answer`.
    """
    if style == "bare":
        return text.strip() or None
    found = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    return (found[-1].strip() or None) if found else None
