"""Thinking that is free and an answer that obeys, in one sequence, for every family."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest
from test_thinking import merged_tokenizer

from chat_families import FAMILIES, family, speak
from openbook.core.errors import UserError
from openbook.engine.answer_guide import AnswerGuide
from openbook.engine.request import Constraint
from openbook.engine.structured import GrammarCompiler
from openbook.engine.transcript import Transcript
from openbook.tokenizer.marks import THINKING, ChatFormat
from openbook.tokenizer.tokenizer import Tokenizer
from random_answers import PROMPTS, answer_at_random, compiler_of

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "note": {"type": "string", "maxLength": 4}},
    "required": ["ok", "note"],
    "additionalProperties": False,
}
JSON = Constraint(kind="json_schema", source=json.dumps(SCHEMA))
THINKERS = [name for name in FAMILIES if name != "llama"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_answer_obeys_whatever_was_thought(name: str) -> None:
    has_thought = set()
    for seed in range(10):
        transcript, ids, guide = answer_at_random(name, JSON, seed, 12)
        jsonschema.validate(json.loads(transcript.text), SCHEMA)
        assert guide.num_thinking_tokens <= 12
        assert max(ids) < family(name).tokenizer.vocab_size
        has_thought.add(bool(transcript.reasoning))
    assert (True in has_thought) == (name in THINKERS)


@pytest.mark.parametrize("name", [name for name in THINKERS if name != "r1_distill"])  # no mark in text comes by chance
def test_thinking_without_a_limit_ends_by_itself(name: str) -> None:
    for seed in range(3):
        transcript, _, _ = answer_at_random(name, JSON, seed, None)
        jsonschema.validate(json.loads(transcript.text), SCHEMA)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_budget_there_is_no_thinking(name: str) -> None:
    for seed in range(4):
        transcript, _, guide = answer_at_random(name, JSON, seed, 0)
        jsonschema.validate(json.loads(transcript.text), SCHEMA)
        assert (transcript.reasoning, guide.num_thinking_tokens) == ("", 0)


def guide_of(
    name: str, constraint: Constraint | None, budget: int | None = None, prompt: str | None = None
) -> AnswerGuide:
    chat = family(name)
    grammar = compiler_of(chat).compile(constraint) if constraint else None
    prompt_ids = speak(chat.tokenizer, PROMPTS[name])
    return AnswerGuide(chat.tokenizer, chat.format, prompt_ids, budget, grammar)


def allowed(guide: AnswerGuide, tokenizer: Tokenizer) -> set[str]:
    masked = guide.masked(np.zeros(tokenizer.vocab_size + 5, dtype=np.float32))
    return {tokenizer.decode([int(index)]) for index in np.flatnonzero(np.isfinite(masked))}


def say(guide: AnswerGuide, tokenizer: Tokenizer, text: str) -> None:
    for token_id in speak(tokenizer, text):
        guide.push(token_id)


def test_thinking_is_free_but_for_the_end_of_the_answer() -> None:
    tokenizer = family("qwen3").tokenizer
    guide = guide_of("qwen3", JSON)
    assert allowed(guide, tokenizer) == {"<think>", "{", "\n"}
    say(guide, tokenizer, "<think>")
    free = set(map(tokenizer.decode, ([index] for index in range(tokenizer.vocab_size))))
    assert allowed(guide, tokenizer) == free - {"<|im_end|>"}
    say(guide, tokenizer, "{</think>")
    assert allowed(guide, tokenizer) == {"{", "\n"}
    say(guide, tokenizer, "\n\n")
    assert allowed(guide, tokenizer) == {"{"}


def test_a_harmony_answer_stands_in_its_channel() -> None:
    tokenizer = family("harmony").tokenizer
    guide = guide_of("harmony", JSON)
    assert allowed(guide, tokenizer) == {"<|channel|>"}
    say(guide, tokenizer, "<|channel|>")
    assert allowed(guide, tokenizer) == {"a", "f"}
    say(guide, tokenizer, "analysis<|message|>{")
    assert set(tokenizer.control_tokens) & allowed(guide, tokenizer) == {"<|end|>"}
    say(guide, tokenizer, "<|end|>")
    assert allowed(guide, tokenizer) == {"<|start|>"}
    say(guide, tokenizer, "<|start|>assistant<|channel|>")
    assert allowed(guide, tokenizer) == {"a", "f"}
    say(guide, tokenizer, "final<|message|>")
    assert allowed(guide, tokenizer) == {"{"}


def test_a_budget_alone_leaves_everything_free() -> None:
    guide = guide_of("qwen3", None, 2)
    logits = np.zeros(300, dtype=np.float32)
    assert guide.masked(logits) is logits
    tokenizer = family("qwen3").tokenizer
    mark, a, b = speak(tokenizer, "<think>ab")
    assert [guide.push(mark), guide.push(a)] == [[], []]
    forced = guide.push(b)
    assert tokenizer.decode(forced) == "</think>"
    assert [guide.push(token_id) for token_id in forced] == [[]]
    assert guide.masked(logits) is logits
    assert guide.num_thinking_tokens == 2
    assert not guide.is_finished


def test_thinking_that_the_prompt_opens_is_closed_at_the_start_if_it_has_no_budget() -> None:
    tokenizer = family("r1").tokenizer
    for constraint in (None, JSON):
        guide = guide_of("r1", constraint, 0)
        assert allowed(guide, tokenizer) == {"\n"}
        rest = guide.push(tokenizer.encode("\n")[0])
        assert tokenizer.decode(rest) == "</think>\n\n"
        assert [guide.push(token_id) for token_id in rest] == [[]] * len(rest)
    assert allowed(guide, tokenizer) == {"{"}  # the line is broken already


def test_an_answer_is_known_to_be_finished_before_its_stop_token() -> None:
    tokenizer = family("qwen3").tokenizer
    guide = guide_of("qwen3", Constraint(kind="regex", source="ab?"))
    seen = []
    for token_id in tokenizer.encode("ab"):
        guide.push(token_id)
        seen.append(guide.is_finished)
    assert seen == [False, True]
    assert allowed(guide, tokenizer) == {"<|im_end|>"}


def test_a_token_that_is_not_allowed_is_one_line() -> None:
    guide = guide_of("qwen3", JSON)
    with pytest.raises(UserError, match=r"^token \d+ does not obey the answer's constraint: take those that it"):
        say(guide, family("qwen3").tokenizer, "x")


def test_guesses_that_are_not_allowed_need_not_be_computed() -> None:
    tokenizer = family("qwen3").tokenizer
    guide = guide_of("qwen3", Constraint(kind="regex", source="abc"))
    assert guide.num_allowed(tokenizer.encode("zz")) == 2  # may yet be thinking
    say(guide, tokenizer, "<think>q</think>")
    assert guide.num_allowed(tokenizer.encode("abz")) == 2
    assert guide_of("r1", None, 0).num_allowed([1, 2]) == 0  # the next tokens are known
    assert guide_of("r1", None).num_allowed([1, 2]) == 2


def test_the_same_tokens_are_guided_alike_with_and_without_guesses() -> None:
    tokenizer = family("qwen3").tokenizer
    logits = np.random.default_rng(0).standard_normal(tokenizer.vocab_size + 5).astype(np.float32)
    first, second = guide_of("qwen3", JSON), guide_of("qwen3", JSON)
    text = speak(tokenizer, '<think>a</think>{"ok": true, "note": "é"}<|im_end|>')
    for count, token_id in enumerate(text):
        second.num_allowed(text[count : count + 5])
        second.num_allowed([token_id, *tokenizer.encode("zz")])
        assert np.array_equal(first.masked(logits), second.masked(logits))
        first.push(token_id)
        second.push(token_id)
    assert first.is_finished
    assert second.is_finished


# Marks that are text, in a vocabulary whose tokens run across them.
CUT = merged_tokenizer(["<th", "ink>\n", "</", "think", ">\n\n", ">{", '{"', "b</think>{", '"<think>'])
CUT_FORMAT = ChatFormat(thinking=THINKING["think"])


def test_marks_in_text_do_not_hide_the_answer_from_the_grammar() -> None:
    compiler = GrammarCompiler(CUT, CUT.vocab_size, CUT_FORMAT)
    anything = Constraint(kind="json_schema", source="{}")
    for seed in range(40):
        prompt_ids = CUT.encode("<think>\n" if seed % 2 else "q")
        guide = AnswerGuide(CUT, CUT_FORMAT, prompt_ids, 8, compiler.compile(JSON if seed % 4 else anything))
        transcript = Transcript(CUT, chat_format=CUT_FORMAT, prompt_ids=prompt_ids)
        rng = np.random.default_rng(seed)
        likely = [index for index in range(CUT.vocab_size) if len(compiler.token_bytes[index]) > 1]
        while not transcript.is_stopped:
            logits = rng.standard_normal(CUT.vocab_size).astype(np.float32)
            logits[likely] += 1.0
            logits[CUT.encode('"') + CUT.encode("}") + CUT.encode("]")] += 2.0
            chosen = [int(guide.masked(logits).argmax())]
            for token_id in chosen:
                transcript.push(token_id)
                chosen += guide.push(token_id)
        value = json.loads(transcript.text)
        if seed % 4:
            jsonschema.validate(value, SCHEMA)


def test_a_token_that_ends_the_thinking_and_says_more_is_not_allowed() -> None:
    compiler = GrammarCompiler(CUT, CUT.vocab_size, CUT_FORMAT)
    guide = AnswerGuide(CUT, CUT_FORMAT, CUT.encode("<think>\n"), None, compiler.compile(JSON))
    both, end, more = (compiler.token_bytes.index(text) for text in (b"b</think>{", b">\n\n", b">{"))
    assert both not in finite(guide)
    assert more in finite(guide)
    for token_id in CUT.encode("</") + CUT.encode("think"):
        guide.push(token_id)
    assert more not in finite(guide)
    assert end in finite(guide)
    guide.push(end)
    assert CUT.encode('{"')[0] in finite(guide)


def test_a_mark_in_text_may_begin_like_the_answer() -> None:
    compiler = GrammarCompiler(CUT, CUT.vocab_size, CUT_FORMAT)
    markup = Constraint(kind="regex", source="<th>|<td>")
    for text, is_thinking in (("<th>", False), ("<think>\n", True)):
        guide = AnswerGuide(CUT, CUT_FORMAT, CUT.encode("q"), None, compiler.compile(markup))
        for token_id in CUT.encode(text):
            assert token_id in finite(guide)
            guide.push(token_id)
        assert guide.is_finished != is_thinking
        if is_thinking:
            for token_id in [*CUT.encode("ab</think>"), *CUT.encode("<td>")]:
                assert token_id in finite(guide)
                guide.push(token_id)
            assert guide.is_finished


def finite(guide: AnswerGuide) -> set[int]:
    return set(np.flatnonzero(np.isfinite(guide.masked(np.zeros(CUT.vocab_size, dtype=np.float32)))).tolist())
