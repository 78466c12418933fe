"""From the engine's events to the output items of a response, and to the events that tell of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from openbook.engine.request import FinishReason
from openbook.engine.transcript import Piece
from openbook.server.response_items import new_id
from openbook.tokenizer.parse import Kind
from openbook.tokenizer.tools import ToolCall

Event = dict[str, Any]

# Of each kind of text: the type of its item and of its part, and what its events are called.
_NAMES: dict[Kind, tuple[str, str, str]] = {
    "reasoning": ("reasoning", "reasoning_text", "response.reasoning_text"),
    "answer": ("message", "output_text", "response.output_text"),
}


class OutputBuilder:
    """Puts the items of one response together, in the order in which the model says them."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []  # those that have ended
        self._events: list[Event] = []
        self._kind: Kind | None = None  # of the text that is being said
        self._item_id = ""
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        # White space that begins a message is held until there is more of it: some families put lines between calls.
        self._blank = ""

    def add(
        self, pieces: Sequence[Piece], calls: Iterable[ToolCall], logprobs: Sequence[dict[str, Any]] = ()
    ) -> list[Event]:
        """Take what one step brought; the events that tell of it.

        Args:
            pieces: new text, before `calls`.
            logprobs: of the tokens of the answer in it, as in chat completions.
        """
        last_answer = max((index for index, piece in enumerate(pieces) if piece.kind == "answer"), default=-1)
        for index, piece in enumerate(pieces):
            self._say(piece, logprobs if index == last_answer else ())
        for call in calls:
            self._call(call)
        return self._taken()

    def end(self, reason: FinishReason) -> list[Event]:
        """Nothing more comes; the last events."""
        blank = self._blank
        if blank and all(item["type"] == "reasoning" for item in self.items):
            self._open("answer")
            self._put(blank, ())
        self._close("incomplete" if reason == "length" else "completed")
        return self._taken()

    def _say(self, piece: Piece, logprobs: Sequence[dict[str, Any]]) -> None:
        text = piece.text
        if piece.kind == "answer" and self._kind != "answer":
            text = self._blank + text
            if not text.strip():
                self._blank = text
                return
        self._blank = ""
        if piece.kind != self._kind:
            self._open(piece.kind)
        self._put(text, logprobs)

    def _open(self, kind: Kind) -> None:
        self._close()
        self._kind, self._item_id, self._texts, self._logprobs = kind, new_id(_NAMES[kind][0]), [], []
        self._emit("response.output_item.added", item=self._item("in_progress", []))
        self._emit("response.content_part.added", **self._place(), part=self._part(""))

    def _put(self, text: str, logprobs: Sequence[dict[str, Any]]) -> None:
        assert self._kind is not None
        self._texts.append(text)
        self._logprobs += logprobs
        name = _NAMES[self._kind][2]
        extra = {"logprobs": list(logprobs)} if self._kind == "answer" else {}
        self._emit(f"{name}.delta", **self._place(), delta=text, **extra)

    def _close(self, status: str = "completed") -> None:
        if self._kind is None:
            return
        text, name = "".join(self._texts), _NAMES[self._kind][2]
        extra = {"logprobs": self._logprobs} if self._kind == "answer" else {}
        part = self._part(text)
        self._emit(f"{name}.done", **self._place(), text=text, **extra)
        self._emit("response.content_part.done", **self._place(), part=part)
        self._end_item(self._item(status, [part]))
        self._kind = None

    def _call(self, call: ToolCall) -> None:
        self._close()
        self._blank = ""
        item = {
            "id": new_id("function_call"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
        }
        place = {"item_id": item["id"], "output_index": len(self.items)}
        self._emit("response.output_item.added", item=item)
        self._emit("response.function_call_arguments.delta", **place, delta=call.arguments)
        self._emit("response.function_call_arguments.done", **place, name=call.name, arguments=call.arguments)
        self._end_item({**item, "status": "completed", "arguments": call.arguments})

    def _end_item(self, item: dict[str, Any]) -> None:
        self._emit("response.output_item.done", item=item)
        self.items.append(item)

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        assert self._kind is not None
        item = {"id": self._item_id, "type": _NAMES[self._kind][0], "status": status}
        more: dict[str, Any] = {"summary": []} if self._kind == "reasoning" else {"role": "assistant"}
        return {**item, **more, "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        assert self._kind is not None
        part = {"type": _NAMES[self._kind][1], "text": text}
        return part if self._kind == "reasoning" else {**part, "annotations": [], "logprobs": list(self._logprobs)}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": len(self.items), "content_index": 0}

    def _emit(self, kind: str, **fields: Any) -> None:
        self._events.append({"type": kind, "output_index": len(self.items), **fields})

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events
