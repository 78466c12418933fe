"""The items of a response, and the events that tell of them, in the order in which a model says things."""

from __future__ import annotations

from typing import Any

import pytest

from openbook.engine.transcript import Piece
from openbook.server.response_output import Event, OutputBuilder
from openbook.tokenizer.tools import ToolCall

CALL = "function_call"


def think(text: str) -> Piece:
    return Piece("reasoning", text)


def say(text: str) -> Piece:
    return Piece("answer", text)


def call(name: str) -> ToolCall:
    return ToolCall(id=f"id of {name}", name=name, arguments="{}")


def build(*steps: Piece | ToolCall, reason: Any = "stop") -> tuple[list[tuple[str, str, str]], list[Event]]:
    """Type, status and text of each item, and all events of steps that bring one thing each."""
    builder = OutputBuilder()
    events: list[Event] = []
    for step in steps:
        events += builder.add([step], []) if isinstance(step, Piece) else builder.add([], [step])
    events += builder.end(reason)
    items = [
        (item["type"], item["status"], item["name"] if item["type"] == "function_call" else item["content"][0]["text"])
        for item in builder.items
    ]
    _check(events, builder.items)
    return items, events


def _check(events: list[Event], items: list[dict[str, Any]]) -> None:
    """What the events tell is what the items hold."""
    told: dict[int, dict[str, Any]] = {}
    texts: dict[int, str] = {}
    for event in events:
        index = event["output_index"]
        if event["type"] == "response.output_item.added":
            assert index == len(told) and event["item"]["status"] == "in_progress"
            told[index], texts[index] = event["item"], ""
        elif event["type"].endswith(".delta"):
            assert event["item_id"] == told[index]["id"] and event["delta"]
            texts[index] += event["delta"]
        elif event["type"].endswith("text.done"):
            assert event["text"] == texts[index]
        elif event["type"] == "response.output_item.done":
            assert event["item"] == items[index] and event["item"]["id"] == told[index]["id"]
    assert len(told) == len(items)
    for item, text in zip(items, texts.values(), strict=True):
        assert text == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], []),
        ([say("a"), say("b")], [("message", "ab")]),
        ([think("a"), think("b"), say("c")], [("reasoning", "ab"), ("message", "c")]),
        ([think("a"), say("b"), think("c"), say("d")],
         [("reasoning", "a"), ("message", "b"), ("reasoning", "c"), ("message", "d")]),
        ([call("f"), call("g")], [(CALL, "f"), (CALL, "g")]),
        ([say("see: \n"), call("f"), say("done")], [("message", "see: \n"), (CALL, "f"), ("message", "done")]),
        # White space beside calls is no message, before text it is part of it.
        ([say("\n"), call("f"), say(" "), say("\n"), call("g"), say("\n")], [(CALL, "f"), (CALL, "g")]),
        ([call("f"), say("\n"), say("a")], [(CALL, "f"), ("message", "\na")]),
        ([think("a"), say(" "), think("b"), say("c")], [("reasoning", "ab"), ("message", "c")]),
        # But an answer of nothing else is one.
        ([think("a"), say(" "), say(" ")], [("reasoning", "a"), ("message", "  ")]),
        ([say(" ")], [("message", " ")]),
    ],
)  # fmt: skip
def test_items(steps: list[Any], expected: list[tuple[str, str]]) -> None:
    items, _ = build(*steps)
    assert [(kind, text) for kind, _, text in items] == expected
    assert {status for _, status, _ in items} <= {"completed"}


@pytest.mark.parametrize("steps", [[think("a")], [think("a"), say("b")], [say(" ")]])
def test_what_is_cut_off_is_incomplete(steps: list[Piece]) -> None:
    items, _ = build(*steps, reason="length")
    assert [status for _, status, _ in items] == [*["completed"] * (len(items) - 1), "incomplete"]


def test_a_cut_behind_a_call_leaves_it_complete() -> None:
    assert build(call("f"), reason="length")[0] == [(CALL, "completed", "f")]


def test_one_step_may_bring_several_things() -> None:
    builder = OutputBuilder()
    events = builder.add([think("a"), say("b"), say("c")], [call("f")], [{"token": "b"}, {"token": "c"}])
    events += builder.end("stop")
    _check(events, builder.items)
    assert [item["type"] for item in builder.items] == ["reasoning", "message", "function_call"]
    assert builder.items[1]["content"][0]["logprobs"] == [{"token": "b"}, {"token": "c"}]
    deltas = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert deltas == [[], [{"token": "b"}, {"token": "c"}]]


def test_events_do_not_change_afterwards() -> None:
    builder = OutputBuilder()
    events = builder.add([say("a")], [], [{"token": "a"}])
    before = [repr(event) for event in events]
    builder.add([say("b")], [], [{"token": "b"}])
    builder.end("stop")
    assert [repr(event) for event in events] == before
