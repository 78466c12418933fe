"""What a request's tools and tool_choice mean for the prompt and the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from openbook.core.errors import UserError
from openbook.engine.request import Constraint
from openbook.server.errors import ApiError, user_error
from openbook.server.prompts import require_chat
from openbook.server.served_model import ServedModel

Choice = Literal["none", "auto", "required"]


@dataclass(frozen=True, kw_only=True)
class ToolPlan:
    """How tools take part in one answer.

    Args:
        shown: those that the prompt describes, in the OpenAI API's shape.
        constraint: what makes the answer a call; None where the model decides.
        max_calls: most calls that are passed on; None: all.
    """

    shown: Sequence[dict[str, Any]] = ()
    constraint: Constraint | None = None
    max_calls: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tools on offer."""
        return tuple(tool["function"]["name"] for tool in self.shown)


async def plan_tools(
    model: ServedModel, tools: Sequence[dict[str, Any]], choice: Choice, name: str | None, is_parallel: bool
) -> ToolPlan:
    """Decide how tools take part.

    Args:
        tools: in the OpenAI API's shape.
        choice: who decides whether one is called; without tools it is none.
        name: the one that must be called, with "required"; None: any.
        is_parallel: whether an answer may have several calls.

    Raises:
        ApiError: 400, two share a name, the one that is named is none of them, or the model cannot be made to call.
    """
    names = [tool["function"]["name"] for tool in tools]
    twice = next((each for each in names if names.count(each) > 1), None)
    if twice is not None:
        raise ApiError(400, f"two tools are called {twice!r}: give each a name of its own", param="tools")
    if choice == "required" and not tools:
        raise ApiError(400, "tool_choice asks for a call and there are no tools: give some", param="tool_choice")
    if choice == "none" or not tools:
        return ToolPlan()
    max_calls = None if is_parallel else 1
    if choice == "auto":
        return ToolPlan(shown=tools, max_calls=max_calls)
    from openbook.engine.tool_grammar import tool_constraint

    chat = require_chat(model)

    def compile_calls() -> Constraint:
        return tool_constraint(chat, tools, name=name, is_parallel=is_parallel)

    try:
        constraint = await asyncio.to_thread(compile_calls)
    except UserError as error:
        is_unknown = name is not None and name not in names
        raise user_error(error, "tool_choice" if is_unknown else "tools") from error
    return ToolPlan(shown=tools, constraint=constraint, max_calls=max_calls)
