"""Calls that are required, in every family's syntax: whatever the model prefers, a transcript reads calls back."""
# ruff: noqa: E501 (what is spoken stands on one line)

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from chat_families import FAMILIES, WEATHER, family, speak
from openbook.core.errors import UserError
from openbook.engine.answer_guide import AnswerGuide
from openbook.engine.tool_grammar import tool_constraint
from openbook.engine.transcript import Transcript
from openbook.tokenizer.chat import Chat
from random_answers import PROMPTS, answer_at_random, compiler_of


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    function = {"name": name, **more} if parameters is None else {"name": name, "parameters": parameters, **more}
    return {"type": "function", "function": function}


ADD = tool(
    "add",
    {
        "type": "object",
        "properties": {
            "a": {"$ref": "#/$defs/number"},
            "b": {"type": "array", "items": {"$ref": "#/$defs/number"}, "maxItems": 2},
            "how": {"enum": ['"quoted"', "line\nbreak", "</tool_call>", "é"]},
        },
        "required": ["a", "b", "how"],
        "additionalProperties": False,
        "$defs": {"number": {"type": "integer", "minimum": -5, "maximum": 99}},
    },
)
NOW = tool("now.utc")
TOOLS = [WEATHER, ADD, NOW]
NAMES = ["get_weather", "add", "now.utc"]
# Those that may write several calls in one answer.
PARALLEL = {"qwen3", "r1", "r1_distill", "mistral"}


def check(calls: list[Any]) -> None:
    schemas = {"get_weather": WEATHER["function"]["parameters"], "add": ADD["function"]["parameters"]}
    for call in calls:
        arguments = json.loads(call.arguments)
        if call.name == "now.utc":
            assert arguments == {}
        else:
            jsonschema.validate(arguments, schemas[call.name])


@pytest.mark.parametrize("name", FAMILIES)
def test_any_answer_is_calls_and_nothing_else(name: str) -> None:
    counts, called = set(), set()
    for seed in range(12):
        wanted = tool_constraint(family(name), TOOLS)
        transcript, _, guide = answer_at_random(name, wanted, seed, 10, tool_names=NAMES, likely='"}]')
        assert transcript.text == ""
        assert guide.num_thinking_tokens <= 10
        check(transcript.tool_calls)
        counts.add(len(transcript.tool_calls))
        called |= {call.name for call in transcript.tool_calls}
    assert 0 not in counts
    assert (max(counts) > 1) == (name in PARALLEL)
    assert called == set(NAMES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_named_tool_is_called_once(name: str) -> None:
    for seed in range(5):
        wanted = tool_constraint(family(name), TOOLS, name="add")
        transcript, _, _ = answer_at_random(name, wanted, seed, 5, tool_names=NAMES, likely='"}]')
        assert [call.name for call in transcript.tool_calls] == ["add"]
        assert transcript.text == ""
        check(transcript.tool_calls)


@pytest.mark.parametrize("name", sorted(PARALLEL))
def test_calls_can_be_limited_to_one(name: str) -> None:
    for seed in range(8):
        wanted = tool_constraint(family(name), TOOLS, is_parallel=False)
        transcript, _, _ = answer_at_random(name, wanted, seed, 5, tool_names=NAMES, likely='"}]')
        assert len(transcript.tool_calls) == 1


CITY = '{"city": "Paris"}'
# A chat, the thinking before the calls, and calls as the family's template or its makers' documentation writes them.
WRITTEN: dict[str, tuple[Chat, str, str]] = {
    "Qwen 3": (
        family("qwen3"),
        "<think>\na\n</think>\n\n",
        f'<tool_call>\n{{"name": "get_weather", "arguments": {CITY}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now.utc", "arguments": {}}\n</tool_call><|im_end|>',
    ),
    "R1": (
        family("r1"),
        "a\n</think>\n\n",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{CITY}\n```<｜tool▁call▁end｜>\n"
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now.utc\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        "<｜end▁of▁sentence｜>",
    ),
    "V3.1": (
        Chat(family("r1").tokenizer, family("r1").template.replace("```json", "")),
        "a\n</think>",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{CITY}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>now.utc<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
    ),
    "Mistral": (
        family("mistral"),
        "",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {CITY}}}, {{"name": "now.utc", "arguments": {{}}}}]</s>',
    ),
    "Mistral, v11": (
        Chat(family("mistral").tokenizer, family("mistral").template + "{# [CALL_ID] [ARGS] #}"),
        "[THINK]a[/THINK]",
        f"[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{CITY}[TOOL_CALLS]now.utc[CALL_ID]a1b2c3d4f[ARGS]{{}}</s>",
    ),
    "Mistral, v13": (
        Chat(family("mistral").tokenizer, family("mistral").template + "{# [ARGS] #}"),
        "[THINK]a[/THINK]",
        f"[TOOL_CALLS]get_weather[ARGS]{CITY}[TOOL_CALLS]now.utc[ARGS]{{}}</s>",
    ),
    "Llama": (family("llama"), "", f'{{"name": "get_weather", "parameters": {CITY}}}<|eom_id|>'),
    "gpt-oss": (
        family("harmony"),
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant",
        f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{CITY}<|call|>",
    ),
    "Hermes with marks in text": (
        Chat(family("r1_distill").tokenizer, family("qwen3").template.replace("<|im_end|>", "</s>")),
        "",
        f'<tool_call>\n{{"name": "get_weather", "arguments": {CITY}}}\n</tool_call><｜end▁of▁sentence｜>',
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_models_have_learned_to_write_is_allowed(case: str) -> None:
    chat, thinking, calls = WRITTEN[case]
    name = next(name for name in FAMILIES if family(name).tokenizer is chat.tokenizer)
    prompt_ids = speak(chat.tokenizer, PROMPTS[name] if thinking or name == "harmony" else "q")
    grammar = compiler_of(chat).compile(tool_constraint(chat, TOOLS))
    guide = AnswerGuide(chat.tokenizer, chat.format, prompt_ids, None, grammar)
    transcript = Transcript(chat.tokenizer, chat_format=chat.format, prompt_ids=prompt_ids, tool_names=NAMES)
    logits = np.zeros(compiler_of(chat).vocab_size, dtype=np.float32)
    for token_id in speak(chat.tokenizer, thinking + calls):
        assert np.isfinite(guide.masked(logits)[token_id])
        assert guide.push(token_id) == []
        transcript.push(token_id)
    assert transcript.is_stopped
    assert transcript.text == ""
    assert transcript.reasoning.strip() == ("a" if thinking else "")
    written = [(call.name, call.arguments) for call in transcript.tool_calls]
    assert written in ([("get_weather", CITY)], [("get_weather", CITY), ("now.utc", "{}")])


def test_names_and_texts_of_all_kinds() -> None:
    names = ["a-b", "f:g/h", "x" * 256, "größe"]
    for name in names:
        wanted = tool_constraint(family("qwen3"), [tool(one) for one in names], name=name)
        transcript, _, _ = answer_at_random("qwen3", wanted, 1, 0, tool_names=names)
        assert [call.name for call in transcript.tool_calls] == [name]


def test_what_cannot_be_enforced_is_left_to_the_model_unless_the_tool_is_strict() -> None:
    schema = {"type": "object", "properties": {"key": {"type": "string", "format": "password"}}, "required": ["key"]}
    compiler = compiler_of(family("llama"))
    compiler.compile(tool_constraint(family("llama"), [tool("f", schema)]))
    with pytest.raises(UserError, match=r"^the Lark grammar is refused \(.*Unknown format: password.*\): expected"):
        compiler.compile(tool_constraint(family("llama"), [tool("f", schema, strict=True)]))


@pytest.mark.parametrize(
    ("name", "tools", "options", "line"),
    [
        ("qwen3", [], {}, r"a call of a tool is required and there is none: give tools, or let the model answer in words"),
        ("qwen3", TOOLS, {"name": "ad"}, r"unknown tool 'ad': did you mean 'add'\? given are get_weather, add, now\.utc; "),
        ("qwen3", [tool("a b")], {}, r"the name of a tool is 'a b': expected letters, digits and any of _ \. : / -$"),
        ("qwen3", [tool("f", {"type": "string"})], {}, r"the parameters of the tool 'f' are {\"type\": \"string\"}: expec"),
        ("qwen3", [tool("f", [1])], {}, r"the parameters of the tool 'f' are \[1\]: expected the JSON schema of an obje"),
        ("qwen3", [{"name": "f"}], {}, r"a tool is \"{'name': 'f'}\": expected "),
        ("words", TOOLS, {}, r"this model's chat template knows no tool calls and one is required: let it answer in wo"),
    ],
)  # fmt: skip
def test_calls_that_cannot_be_required_are_one_line(name: str, tools: Any, options: Any, line: str) -> None:
    chat = Chat(family("qwen3").tokenizer, "{{ messages[0].content }}") if name == "words" else family(name)
    with pytest.raises(UserError, match=f"^{line}") as caught:
        tool_constraint(chat, tools, **options)
    assert "\n" not in str(caught.value)
