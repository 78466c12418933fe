"""What tests of /v1/responses share."""

from __future__ import annotations

from typing import Any

import openai
import pytest

ADD = {
    "type": "function",
    "name": "add",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    "strict": True,
}
SUB = {**ADD, "name": "sub"}


def ask(sdk: openai.OpenAI, **options: Any) -> Any:
    return sdk.responses.create(**{"model": "tiny", "input": "hello", **options})


def refused(sdk: openai.OpenAI, **options: Any) -> tuple[str, str | None]:
    """The message and the parameter of an answer with status 400."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(sdk, **options)
    body = caught.value.body
    assert isinstance(body, dict) and set(body) == {"message", "type", "param", "code"}
    return body["message"], body["param"]
