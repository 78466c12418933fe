"""Items of the Responses API: as they are kept, and as the messages that a template renders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from uuid import uuid4

from pydantic import BaseModel

from openbook.server.errors import ApiError
from openbook.server.schema_responses import MessageItem

_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}


def new_id(kind: str) -> str:
    """An id for an item of that type."""
    return f"{_PREFIXES[kind]}_{uuid4().hex}"


def plain_items(given: str | Sequence[BaseModel]) -> list[dict[str, Any]]:
    """What a client sends as input, as it is kept: each item with an id, and the content of messages in parts."""
    items = [MessageItem.model_validate({"role": "user", "content": given})] if isinstance(given, str) else given
    return [_plain(item.model_dump(exclude_none=True)) for item in items]


def _plain(item: dict[str, Any]) -> dict[str, Any]:
    item = {"id": new_id(item["type"]), "status": "completed", **item}
    if item["type"] == "message" and isinstance(item["content"], str):
        kind = "output_text" if item["role"] == "assistant" else "input_text"
        item["content"] = [{"type": kind, "text": item["content"]}]
    for part in item["content"] if item["type"] == "message" else ():
        if part["type"] == "output_text":
            part |= {"annotations": part.get("annotations", []), "logprobs": part.get("logprobs", [])}
    return item


def to_messages(instructions: str | None, items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a conversation in the shape of chat completions.

    Neighbouring items of the model (thinking, text, calls) are one message, as the model spoke them.

    Raises:
        ApiError: 400, an output belongs to no call, or there is an image in a message that is not the user's.
    """
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    names: dict[str, str] = {}  # of the functions that were called, by the id of the call
    turn: dict[str, Any] | None = None  # what the model says, as far as it has come
    for item in items:
        kind = item["type"]
        if kind == "function_call_output" or (kind == "message" and item["role"] != "assistant"):
            turn = None
            messages.append(_output(item, names) if kind == "function_call_output" else _message(item))
            continue
        if turn is None or ("content" in turn and "tool_calls" not in turn and kind != "function_call"):
            turn = {"role": "assistant"}
            messages.append(turn)
        if kind == "reasoning":
            turn["reasoning_content"] = turn.get("reasoning_content", "") + _thoughts(item)
        elif kind == "message":
            turn["content"] = turn.get("content", "") + "".join(map(_text, item["content"]))
        else:
            names[item["call_id"]] = item["name"]
            function = {"name": item["name"], "arguments": item["arguments"]}
            turn.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
    return messages


def _message(item: dict[str, Any]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for part in item["content"]:
        if part["type"] == "input_image" and item["role"] == "user":
            parts.append({"type": "image_url", "image_url": {"url": part["image_url"]}})
        else:
            parts.append({"type": "text", "text": _text(part)})
    return {"role": item["role"], "content": parts}


def _text(part: dict[str, Any]) -> str:
    if part["type"] == "input_image":
        raise ApiError(
            400, "an image stands in a message that is not the user's: put it into one of role user", param="input"
        )
    text: str = part["refusal"] if part["type"] == "refusal" else part["text"]
    return text


def _thoughts(item: dict[str, Any]) -> str:
    return "".join(part["text"] for part in item.get("content") or item.get("summary") or ())


def _output(item: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    call_id, output = item["call_id"], item["output"]
    if call_id not in names:
        raise ApiError(
            400,
            f"an output belongs to the call {call_id[:80]!r}, and there is no such call before it: send the "
            "function_call too, or its response as previous_response_id",
            param="input",
        )
    text = output if isinstance(output, str) else "".join(part["text"] for part in output)
    return {"role": "tool", "tool_call_id": call_id, "name": names[call_id], "content": text}
