"""Grammars over our vocabularies: whatever a model prefers, its answer obeys."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest

from chat_families import byte_tokenizer, family
from gguf_vocabularies import LLAMA, trained
from openbook.checkpoint.locate import locate
from openbook.core.errors import UserError
from openbook.engine.request import Constraint
from openbook.engine.structured import GrammarCompiler, GrammarState
from openbook.tokenizer.chat import Chat
from openbook.tokenizer.gguf_vocab import tokenizer_from_gguf
from openbook.tokenizer.tokenizer import Tokenizer

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
        "home": {"$ref": "#/$defs/place"},
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
    "$defs": {"place": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[A-Z][a-z]{2,5}$"}]}},
}


@cache
def vocabulary(name: str) -> Tokenizer:
    if name == "nano":
        return Chat.load(locate("nano")).tokenizer
    if name == "GGUF, byte-level":
        return tokenizer_from_gguf(trained("qwen2"))
    return tokenizer_from_gguf(LLAMA) if name == "GGUF, SentencePiece" else family(name).tokenizer


VOCABULARIES = ["nano", "qwen3", "GGUF, byte-level", "GGUF, SentencePiece"]


@cache
def compiler_of(name: str) -> GrammarCompiler:
    chat_format = family(name).format if name == "qwen3" else None
    return GrammarCompiler(vocabulary(name), vocabulary(name).vocab_size + 7, chat_format)


def constraint(kind: str, source: Any) -> Constraint:
    return Constraint(kind=kind, source=source if isinstance(source, str) else json.dumps(source))  # type: ignore[arg-type]


def say_at_random(compiler: GrammarCompiler, state: GrammarState, seed: int, limit: int = 2000) -> list[int]:
    """Tokens up to and without the first stop token, each the likeliest of those that are allowed."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    while True:
        logits = rng.standard_normal(compiler.vocab_size).astype(np.float32)
        token_id = int(state.masked(logits).argmax())
        assert state.accept(token_id)
        if token_id in compiler.stop_ids:
            assert state.is_complete
            return ids
        ids.append(token_id)
        assert len(ids) < limit


@pytest.mark.parametrize("name", VOCABULARIES)
def test_any_answer_obeys_its_schema(name: str) -> None:
    compiler = compiler_of(name)
    for seed in range(12):
        ids = say_at_random(compiler, compiler.compile(constraint("json_schema", PERSON)), seed)
        jsonschema.validate(json.loads(compiler._tokenizer.decode(ids)), PERSON)


SCHEMAS: list[Any] = [
    {"type": "boolean"},
    {"type": "string", "format": "date"},
    {"type": "array", "items": {"type": "number", "minimum": -1, "maximum": 1}, "minItems": 2, "maxItems": 3},
    {"anyOf": [{"const": {"a": [1, None]}}, {"type": "null"}]},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 1},
    {"enum": ["é", "漢字", 'a"b\\', "\n", "😀"]},
    {"type": "object", "properties": {"a": {"type": "string", "minLength": 2, "maxLength": 3}}, "required": ["a"]},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: next(iter(schema.values())).__class__.__name__)
def test_any_answer_obeys_schemas_of_all_kinds(schema: dict[str, Any]) -> None:
    compiler = compiler_of("nano")
    for seed in range(6):
        ids = say_at_random(compiler, compiler.compile(constraint("json_schema", schema)), seed, 20_000)
        jsonschema.validate(json.loads(vocabulary("nano").decode(ids)), schema)


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("pattern", [r"[a-c]{2,6}(-[0-9]+)?", r"é|漢|a/b", r"(yes|no)\.", r"^\d{3}$", r"\s?x?"])
def test_any_answer_matches_its_expression(name: str, pattern: str) -> None:
    compiler = compiler_of(name)
    for seed in range(5):
        ids = say_at_random(compiler, compiler.compile(constraint("regex", pattern), is_text=True), seed)
        text = b"".join(compiler.token_bytes[index] for index in ids).decode()
        assert re.fullmatch(pattern, text)


CHOICES = ["Paris", "Paris is", "", "漢字 😀", 'a "b" \\ /c/ \x7f\t\n', "<think>", "</tool_call>"]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_an_answer_is_one_of_its_choices_and_any_can_be_said(name: str) -> None:
    compiler = compiler_of(name)
    for seed in range(10):
        state = compiler.compile(constraint("choice", CHOICES), is_text=True)
        text = b"".join(compiler.token_bytes[index] for index in say_at_random(compiler, state, seed)).decode()
        assert text in CHOICES
    for choice in CHOICES:
        state = compiler.compile(constraint("choice", CHOICES), is_text=True)
        for token_id in compiler._tokenizer.encode(choice, "text"):
            assert state.accept(token_id)
        assert state.is_complete
        assert state.allows(min(compiler.stop_ids))


def test_many_choices_are_no_burden() -> None:
    compiler = compiler_of("nano")
    state = compiler.compile(constraint("choice", [f"choice {number}" for number in range(5000)]))
    assert re.fullmatch(r"choice \d{1,4}", vocabulary("nano").decode(say_at_random(compiler, state, 1)))


LARK = """
start: sum
sum: PRODUCT ("+" PRODUCT)*
PRODUCT: NUMBER ("*" NUMBER)*
NUMBER: /[1-9][0-9]?/
"""


@pytest.mark.parametrize("name", VOCABULARIES)
def test_any_answer_obeys_its_grammar(name: str) -> None:
    compiler = compiler_of(name)
    for seed in range(5):
        text = compiler._tokenizer.decode(say_at_random(compiler, compiler.compile(constraint("lark", LARK)), seed))
        assert re.fullmatch(r"\s*[1-9][0-9]?([+*][1-9][0-9]?)*", text)


def test_the_answer_ends_exactly_where_it_may() -> None:
    compiler, tokenizer = compiler_of("qwen3"), vocabulary("qwen3")
    state = compiler.compile(constraint("regex", "ab?"))
    stop = min(compiler.stop_ids)
    seen = []
    for token_id in tokenizer.encode("ab"):
        seen.append((state.allows(stop), state.is_complete, state.is_finished))
        assert state.accept(token_id)
    assert seen == [(False, False, False), (True, True, False)]
    assert (state.is_complete, state.is_finished) == (True, True)
    allowed = np.flatnonzero(np.unpackbits(state.mask().view(np.uint8), bitorder="little"))
    assert allowed.tolist() == sorted(compiler.stop_ids)
    assert not state.accept(tokenizer.encode("c")[0])
    assert state.accept(stop)


def test_every_stop_token_ends_it() -> None:
    control = ["<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"]
    tokenizer = byte_tokenizer(control, "<|eot_id|>")
    tokenizer = Tokenizer(tokenizer.definition, tokenizer.config, extra_stop_ids=[tokenizer.special_id(control[0])])
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, family("llama").format)
    assert compiler.stop_ids == {tokenizer.special_id(token) for token in control[:3]}  # the last by its format
    for stop in compiler.stop_ids:
        state = compiler.compile(constraint("regex", "a"))
        assert not state.accept(stop)
        assert state.accept(tokenizer.encode("a")[0])
        assert state.accept(stop)


def test_a_model_without_stop_tokens_can_be_seen_to_finish() -> None:
    chat = family("qwen3")
    config = {key: value for key, value in chat.tokenizer.config.items() if key != "eos_token"}
    tokenizer = Tokenizer(chat.tokenizer.definition, config)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    assert not compiler.stop_ids
    state = compiler.compile(constraint("choice", ["a"]))
    assert state.mask().shape == (-(-tokenizer.vocab_size // 32),)
    assert state.accept(tokenizer.encode("a")[0])
    assert state.is_finished
    assert not np.isfinite(state.masked(np.zeros(tokenizer.vocab_size, dtype=np.float32))).any()


def test_masked_logits_are_those_of_the_mask() -> None:
    compiler = compiler_of("nano")
    state = compiler.compile(constraint("json_schema", PERSON))
    logits = np.random.default_rng(0).standard_normal(compiler.vocab_size).astype(np.float32)
    before = logits.copy()
    masked = state.masked(logits)
    bits = np.unpackbits(state.mask().view(np.uint8), bitorder="little")[: compiler.vocab_size].astype(bool)
    assert 0 < bits.sum() < 20
    assert not bits[vocabulary("nano").vocab_size :].any()  # logits without a token
    assert np.array_equal(masked, np.where(bits, logits, -np.inf))
    assert np.array_equal(logits, before)
    assert [state.allows(index) for index in range(compiler.vocab_size)] == bits.tolist()


def test_control_tokens_are_never_part_of_a_text() -> None:
    compiler, tokenizer = compiler_of("qwen3"), vocabulary("qwen3")
    state = compiler.compile(constraint("regex", "(?s:.*)"))
    for token_id in tokenizer.encode("<think>"):
        assert state.accept(token_id)  # the letters are text
    for token, token_id in tokenizer.control_tokens.items():
        assert state.allows(token_id) == (token == "<|im_end|>")


def test_guesses_are_checked_without_going_on() -> None:
    compiler, tokenizer = compiler_of("qwen3"), vocabulary("qwen3")
    state = compiler.compile(constraint("json_schema", {"const": "abc"}))
    stop = min(compiler.stop_ids)
    right = [*tokenizer.encode('"abc"'), stop]
    for count, expected in ((0, right), (2, right[2:])):
        for token_id in right[:count]:
            assert state.accept(token_id)
        assert state.validate(expected[:-1]) == len(expected) - 1
        assert state.validate(expected) == len(expected)
        assert state.validate([*expected[:2], *tokenizer.encode("zz")]) == 2
        assert state.validate([stop]) == 0
        assert state.validate([]) == 0
        state.reset()
    for token_id in right:
        assert state.accept(token_id)
    assert state.validate(right) == 0


def test_refused_tokens_change_nothing() -> None:
    compiler, tokenizer = compiler_of("qwen3"), vocabulary("qwen3")
    state = compiler.compile(constraint("regex", "[0-9]+"))
    before = state.mask().copy()
    assert not state.accept(tokenizer.encode("x")[0])
    assert not state.accept(tokenizer.vocab_size + 1)
    assert np.array_equal(state.mask(), before)
    assert state.accept(tokenizer.encode("7")[0])


def test_states_of_one_constraint_are_independent() -> None:
    compiler = compiler_of("qwen3")
    same = constraint("regex", "ab|cd")
    first, second = compiler.compile(same), compiler.compile(same)
    a, b, c, d = (compiler._tokenizer.encode(char)[0] for char in "abcd")
    assert first.accept(a)
    assert second.accept(c)
    assert (first.allows(b), first.allows(d), second.allows(b), second.allows(d)) == (True, False, False, True)
    first.reset()
    assert first.allows(c)


def test_a_constraint_is_compiled_once_and_old_ones_are_forgotten() -> None:
    compiler = GrammarCompiler(vocabulary("qwen3"), vocabulary("qwen3").vocab_size)
    compiler.compile(constraint("regex", "a"))
    kept = compiler._compiled[constraint("regex", "a"), False]
    compiler.compile(constraint("regex", "a"))
    assert compiler._compiled[constraint("regex", "a"), False] is kept
    for number in range(64):
        compiler.compile(constraint("regex", f"a{number}"))
    assert len(compiler._compiled) == 64
    assert (constraint("regex", "a"), False) not in compiler._compiled


def test_threads_may_compile_at_the_same_time() -> None:
    compiler = GrammarCompiler(vocabulary("qwen3"), vocabulary("qwen3").vocab_size)
    texts: list[str] = []

    def work(seed: int) -> None:
        for number in range(4):
            state = compiler.compile(constraint("regex", f"x{number}[ab]{{20}}"))
            texts.append(vocabulary("qwen3").decode(say_at_random(compiler, state, seed)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 16
    assert all(re.fullmatch(r"x[0-3][ab]{20}", text) for text in texts)


def test_white_space_that_is_not_shown_may_stand_before_an_answer() -> None:
    compiler, tokenizer = compiler_of("qwen3"), vocabulary("qwen3")  # a format with thinking
    for text, is_text, is_allowed in (("\n\n7", False, True), ("\n\n\n7", False, False), ("\n7", True, False)):
        state = compiler.compile(constraint("regex", "[0-9]"), is_text=is_text)
        ids = tokenizer.encode(text)
        assert (state.validate(ids) == len(ids)) == is_allowed
    without = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    assert without.compile(constraint("regex", "[0-9]")).validate(tokenizer.encode("\n7")) == 0
    # SentencePiece decodes its first word without the space before it
    compiler, tokenizer = compiler_of("GGUF, SentencePiece"), vocabulary("GGUF, SentencePiece")
    ids = tokenizer.encode("ab", "nothing")
    assert b"".join(compiler.token_bytes[index] for index in ids) == b" ab"
    assert tokenizer.decode(ids) == "ab"
    assert compiler.compile(constraint("choice", ["ab"])).validate(ids) == len(ids)
    assert compiler.compile(constraint("choice", ["ab"]), is_text=True).validate(ids) == 0


def test_white_space_in_json_is_bounded() -> None:
    compiler, tokenizer = compiler_of("qwen3"), vocabulary("qwen3")
    for text, is_allowed in (
        ('{"a":1}', True),
        ('{"a": 1}', True),
        ('{\n    "a": 1\n}', True),
        ('{\r\n\t"a": 1\r\n}', True),
        ('{\n\n"a": 1}', False),
        (f'{{{" " * 65}"a": 1}}', False),
    ):
        state = compiler.compile(constraint("json_schema", {"type": "object", "properties": {"a": {"const": 1}}}))
        ids = tokenizer.encode(text)
        assert (state.validate(ids) == len(ids)) == is_allowed, text


REFUSED = [
    (
        "json_schema",
        "{",
        r"the JSON schema is refused \(Expecting property name .*\): expected one that can be enforced; ",
    ),
    ("json_schema", "[1]", r"the JSON schema is refused \(it is no JSON object\): "),
    ("json_schema", {"type": "zebra"}, r"the JSON schema is refused \(Invalid type: zebra\): "),
    ("json_schema", {"type": "string", "format": "zebra"}, r"the JSON schema is refused \(Unknown format: zebra\): "),
    ("json_schema", {"not": {}}, r'the JSON schema is refused \(Unimplemented keys: \["not"\]\): '),
    (
        "json_schema",
        {"$ref": "https://example.org/x.json"},
        r"the JSON schema is refused \(Resource .* is not present ",
    ),
    ("json_schema", {"x-guidance": 1}, r"the JSON schema is refused \(its x-guidance is no JSON object\): "),
    ("json_schema", '{"a":' * 20_000 + "1" + "}" * 20_000, r"the JSON schema is refused \(maximum recursion depth "),
    ("json_schema", {"allOf": [{"const": 1}, {"const": 2}]}, r"the JSON schema is refused \(Unsatisfiable schema"),
    ("regex", "(a", r"the regular expression is refused \(.* error: unclosed group"),
    (
        "regex",
        "(?=a)b",
        r"the regular expression is refused \(.* look-around, including look-ahead and look-behind, is",
    ),
    ("choice", [], r"the list of choices is refused \(it is no JSON list of at least one string\): "),
    ("choice", ["a", 1], r"the list of choices is refused \(it is no JSON list of at least one string\): "),
    ("lark", "start: thing", r'the Lark grammar is refused \(at 1\(8\): unknown name: "thing"'),
    ("lark", "", r"the Lark grammar is refused \(no start rule found\): "),
    ("lark", '{"grammars": []}', r"the Lark grammar is refused \(1\(1\): expecting rule, token or statement"),
]


@pytest.mark.parametrize(("kind", "source", "line"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_enforced_is_one_line(kind: str, source: Any, line: str) -> None:
    with pytest.raises(UserError, match=f"^{line}") as caught:
        compiler_of("qwen3").compile(constraint(kind, source))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 320


def test_an_answer_that_no_token_can_begin_is_one_line() -> None:
    tokenizer = vocabulary("GGUF, SentencePiece")
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    for char in (b"y", b"z"):
        compiler.token_bytes[compiler.token_bytes.index(char)] = b""
    with pytest.raises(
        UserError, match=r"^the regular expression is refused \(.*\): expected one that can be enforced"
    ):
        compiler.compile(constraint("regex", "y|z"), is_text=True)


def test_a_grammar_that_grows_too_complex_ends_its_own_answer_only() -> None:
    compiler, tokenizer = compiler_of("qwen3"), vocabulary("qwen3")
    wide = constraint("json_schema", {"type": "object", "properties": {f"p{n}": {"type": "null"} for n in range(600)}})
    state = compiler.compile(wide)
    begin, quote = tokenizer.encode('{"')
    with pytest.raises(UserError, match=r"^the answer cannot go on within its constraint \(.*\): simplify it$"):
        state.accept(begin)
    assert (wide, False) not in compiler._compiled  # copies would share a lexer that may be at its limit
    assert compiler.compile(wide).allows(begin)  # another answer in its place, from the beginning
    assert not compiler.compile(wide).allows(quote)


def test_nothing_is_imported_before_a_constraint_is_compiled() -> None:
    code = """
import sys
from openbook.engine import answer_guide, structured, tool_grammar
from openbook.tokenizer.chat import Chat
from openbook.checkpoint.locate import locate
tokenizer = Chat.load(locate("nano")).tokenizer
compiler = structured.GrammarCompiler(tokenizer, tokenizer.vocab_size)
assert not {"llguidance", "torch", "fastapi"} & set(sys.modules), "imported too early"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
