"""Answers that must call a tool: a grammar of calls in a family's own syntax.

The answer is nothing but calls, with arguments that obey the tools' schemas; a `Transcript` reads them back. What
stands around the arguments is written as the family's template writes it, since that is what its models have learned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openbook.core.errors import UserError, unknown_name
from openbook.engine.request import Constraint
from openbook.engine.structured import JSON_OPTIONS, lark_text
from openbook.tokenizer.chat import Chat
from openbook.tokenizer.marks import HarmonyMarks, ToolMarks
from openbook.tokenizer.tools import parse_arguments, plain_tools


@dataclass(frozen=True, kw_only=True)
class _Syntax:
    """How calls are written, in Lark: BEFORE BEGIN(name) ARGUMENTS END (BETWEEN BEGIN ...)* AFTER."""

    begin: Callable[[str], str]
    end: str = ""
    between: str | None = None  # None: one call is all that an answer has
    before: str = ""
    after: str = ""


def tool_constraint(
    chat: Chat, tools: Sequence[Mapping[str, Any]], *, name: str | None = None, is_parallel: bool = True
) -> Constraint:
    """What an answer must obey to be calls of tools.

    Args:
        chat: the model's, whose template shows how it writes calls.
        tools: those on offer, as in the OpenAI API. What cannot be enforced in the schema of a tool is left to the
            model, unless the tool is `strict`.
        name: the tool to call, once; None: any of them.
        is_parallel: whether several calls may stand in one answer, where the family writes such.

    Raises:
        UserError: the model's format knows no calls, there is no such tool, or a tool's name or schema cannot be used.
    """
    functions = {tool["function"]["name"]: tool["function"] for tool in plain_tools(tools)}
    if not functions:
        raise UserError("a call of a tool is required and there is none: give tools, or let the model answer in words")
    if name is not None and name not in functions:
        raise unknown_name("tool", name, functions, f"given are {', '.join(functions)}; name one of them")
    syntax = _syntax(chat)
    chosen = list(functions) if name is None else [name]
    rules = [f"call: {' | '.join(f'call_{index}' for index in range(len(chosen)))}"]
    for index, tool in enumerate(chosen):
        if parse_arguments(tool, "{}") is None:
            raise UserError(f"the name of a tool is {tool!r:.80}: expected letters, digits and any of _ . : / -")
        rules.append(f"call_{index}: {syntax.begin(tool)} arguments_{index} {syntax.end}")
        rules.append(f"arguments_{index}: %json {json.dumps(_schema(functions[tool]))}")
    has_more = syntax.between is not None and is_parallel and name is None
    more = f"({syntax.between} call)*" if has_more else ""
    return Constraint(kind="lark", source="\n".join([f"start: {syntax.before} call {more} {syntax.after}", *rules]))


def _syntax(chat: Chat) -> _Syntax:
    control, marks = chat.tokenizer.control_tokens, chat.format.tools

    def spell(mark: str) -> str:
        """A mark as the token that it is, or as text."""
        return f"<[{control[mark]}]>" if mark in control else lark_text(mark)

    if chat.format.harmony:
        return _harmony(chat.format.harmony, spell)
    if marks is None:
        raise UserError(
            "this model's chat template knows no tool calls and one is required: let it answer in words, or take a "
            "model trained to call tools"
        )
    if marks.syntax == "mistral":
        return _mistral(marks, chat.template, spell)
    if marks.syntax == "deepseek":
        return _deepseek(marks, chat.template, spell)
    if marks.is_bare:  # their templates refuse conversations with several calls in one answer
        return _Syntax(begin=lambda name: _json_head(name, "parameters"), end=lark_text("}"))
    end = lark_text("}\n")
    return _Syntax(
        begin=lambda name: f"{spell(marks.open)} {_json_head(name, 'arguments', is_on_new_line=True)}",
        end=f"{end} {spell(marks.close or '')}",
        between=lark_text("\n"),
    )


def _harmony(marks: HarmonyMarks, spell: Callable[[str], str]) -> _Syntax:
    """Of the header in which the prompt ends (harmony's docs/format.md, "Function calling"); the call ends the turn."""
    return _Syntax(
        begin=lambda name: " ".join(
            [
                spell(marks.channel),
                lark_text(f"commentary to={marks.tool_prefix}{name} "),
                spell(marks.constrain),
                lark_text("json"),
                spell(marks.message),
            ]
        )
    )


def _mistral(marks: ToolMarks, template: str, spell: Callable[[str], str]) -> _Syntax:
    """A list of objects, or from v11 on the name apart; v11 has an id between."""
    if "[ARGS]" not in template:
        return _Syntax(
            before=f'{spell(marks.open)} " "? "["',
            begin=lambda name: _json_head(name, "arguments"),
            end=lark_text("}"),
            between=lark_text(", "),
            after=lark_text("]"),
        )
    call_id = f"{spell('[CALL_ID]')} /[A-Za-z0-9]{{9}}/" if "[CALL_ID]" in template else ""
    return _Syntax(
        begin=lambda name: f"{spell(marks.open)} {lark_text(name)} {call_id} {spell('[ARGS]')}",
        between="",
    )


def _deepseek(marks: ToolMarks, template: str, spell: Callable[[str], str]) -> _Syntax:
    """V3 and R1 put the arguments into a fence, V3.1 does not."""
    (separator,), (before, after) = marks.inside, marks.around
    is_fenced = "```json" in template

    def begin(name: str) -> str:
        if is_fenced:
            return " ".join([spell(marks.open), '"function"', spell(separator), lark_text(f"{name}\n```json\n")])
        return " ".join([spell(marks.open), lark_text(name), spell(separator)])

    fence = lark_text("\n```") if is_fenced else ""
    return _Syntax(
        before=spell(before),
        begin=begin,
        end=f"{fence} {spell(marks.close or '')}",
        between=lark_text("\n") if is_fenced else "",
        after=spell(after),
    )


def _json_head(name: str, key: str, is_on_new_line: bool = False) -> str:
    before = "\n" if is_on_new_line else ""
    return lark_text(f'{before}{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": ')


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """What a tool's arguments obey; a tool without parameters takes an empty object."""
    schema = function.get("parameters") or {"properties": {}, "additionalProperties": False}
    kinds = schema.get("type", "object") if isinstance(schema, dict) else None
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise UserError(
            f"the parameters of the tool {function['name']!r} are {json.dumps(schema):.80}: expected the JSON schema "
            'of an object, {"type": "object", "properties": {...}}'
        )
    options = JSON_OPTIONS if function.get("strict") else {**JSON_OPTIONS, "lenient": True}
    return {**schema, "type": "object", "x-guidance": options}
