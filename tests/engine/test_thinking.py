"""Thinking followed token by token, and closed when its budget is spent, in every family's words."""
# ruff: noqa: E501 (what is spoken stands on one line)

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_families import FAMILIES, byte_tokenizer, family, speak
from openbook.engine.thinking import ThinkingTracker
from openbook.engine.transcript import Transcript
from openbook.tokenizer.chat import Chat, default_template
from openbook.tokenizer.marks import THINKING, ChatFormat
from openbook.tokenizer.tokenizer import SPECIAL_TOKENS
from random_answers import merged_tokenizer

# What is likely to matter: marks, whole and in pieces, and what stands between them.
WORDS = {
    "qwen3": ["<think>", "</think>", "\n", "a", "<|im_start|>", "é"],
    "r1": ["<think>", "</think>", "\n", "a", "<｜User｜>"],
    "r1_distill": ["<think>", "</think>", "<th", "ink>", "</thi", "nk>", "<", "/think>", "\n", "a", "é", "<｜User｜>"],
    "mistral": ["[THINK]", "[/THINK]", "a", "[INST]"],
    "llama": ["<think>", "</think>", "a", "<|start_header_id|>"],
    "harmony": ["<|start|>", "assistant", "<|channel|>", "analysis", "final", "<|message|>", "<|end|>", "a", "commentary", "<|constrain|>", " ", "<|startoftext|>"],
}  # fmt: skip


def spoken_so_far(chat: Chat, prompt_ids: list[int], ids: list[int]) -> str:
    """Where a transcript puts an x that follows."""
    transcript = Transcript(chat.tokenizer, chat_format=chat.format, prompt_ids=prompt_ids)
    pieces = [piece for token_id in [*ids, *chat.tokenizer.encode("x")] for piece in transcript.push(token_id)]
    return [*pieces, *transcript.close()][-1].kind


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=60)
@given(data=st.data())
def test_the_next_token_is_where_a_transcript_would_put_it(name: str, data: st.DataObject) -> None:
    chat = family(name)
    words = st.lists(st.sampled_from(WORDS[name]), max_size=10).map(lambda some: speak(chat.tokenizer, "".join(some)))
    prompt_ids, ids = data.draw(words), data.draw(words)
    tracker = ThinkingTracker(chat.tokenizer, chat.format, prompt_ids)
    for count in range(len(ids) + 1):
        if tracker.is_thinking or tracker.is_answering:  # in a header, text is neither
            kind = spoken_so_far(chat, prompt_ids, ids[:count])
            assert kind == ("reasoning" if tracker.is_thinking else "answer")
        if count < len(ids):
            tracker.push(ids[count])


OURS = byte_tokenizer(SPECIAL_TOKENS, "<|end|>")
# Chat, the prompt's end, what the model has thought, and the words that close its thinking.
CLOSINGS = {
    "ours": (Chat(OURS, default_template()), "<|assistant|><|high|>", "<think>ab", "</think>"),
    "Qwen 3": (family("qwen3"), "<|im_start|>assistant\n", "<think>\nab", "\n</think>\n\n"),
    "Qwen 3, behind a line break": (family("qwen3"), "<|im_start|>assistant\n", "<think>\na\n", "</think>\n\n"),
    "Qwen 3, just opened": (family("qwen3"), "<|im_start|>assistant\n", "<think>", "</think>"),
    "R1": (family("r1"), "<｜Assistant｜><think>\n", "ab", "\n</think>\n\n"),
    "R1, nothing thought": (family("r1"), "<｜Assistant｜><think>\n", "", "\n</think>\n\n"),
    "V3.1": (family("r1"), "<｜Assistant｜><think>", "ab", "</think>"),
    "V3.1, which breaks the line itself": (family("r1"), "<｜Assistant｜><think>", "\nb", "\n</think>\n\n"),
    "R1 distilled, marks in text": (family("r1_distill"), "<｜Assistant｜><think>\n", "ab", "\n</think>\n\n"),
    "R1 distilled, in its own mark": (family("r1_distill"), "<｜Assistant｜><think>\n", "ab</th", "ink>\n\n"),
    "R1 distilled, opened in text": (family("r1_distill"), "<｜Assistant｜>", "<think>ab", "</think>"),
    "Magistral": (family("mistral"), "[/INST]", "[THINK]ab", "[/THINK]"),
    "gpt-oss": (family("harmony"), "<|start|>assistant", "<|channel|>analysis<|message|>ab", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    "gpt-oss, a second thought": (family("harmony"), "<|start|>assistant", "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    "gpt-oss, begun in the prompt": (family("harmony"), "<|start|>assistant<|channel|>analysis<|message|>", "ab", "<|end|><|start|>assistant<|channel|>final<|message|>"),
}  # fmt: skip


@pytest.mark.parametrize("case", CLOSINGS)
def test_a_spent_budget_closes_the_thinking_and_begins_the_answer(case: str) -> None:
    chat, prompt, thought, closing = CLOSINGS[case]
    tokenizer = chat.tokenizer
    prompt_ids, ids = speak(tokenizer, f"q{prompt}"), speak(tokenizer, thought)
    counter = ThinkingTracker(tokenizer, chat.format, prompt_ids)
    for token_id in ids:
        counter.push(token_id)
    assert counter.is_thinking
    assert counter.closing_ids() == []
    tracker = ThinkingTracker(tokenizer, chat.format, prompt_ids, counter.num_thinking_tokens)
    for token_id in ids:
        assert tracker.closing_ids() == []
        tracker.push(token_id)
    forced = tracker.closing_ids()
    assert tokenizer.decode(forced) == closing
    assert forced == speak(tokenizer, closing)  # control tokens are control tokens
    for token_id in forced:
        assert tracker.closing_ids() == []  # told once
        tracker.push(token_id)
    assert tracker.is_answering
    assert tracker.num_thinking_tokens == counter.num_thinking_tokens
    # and this is what a reader sees
    transcript = Transcript(tokenizer, chat_format=chat.format, prompt_ids=prompt_ids)
    for token_id in [*ids, *forced, *tokenizer.encode("c")]:
        transcript.push(token_id)
    transcript.close()
    assert transcript.text == "c"
    assert "think" not in transcript.reasoning.lower()


@pytest.mark.parametrize(
    ("name", "prompt", "opening"),
    [
        ("qwen3", "<|im_start|>assistant\n", "<think>"),
        ("r1_distill", "<｜Assistant｜>", "<think>"),
        ("mistral", "[/INST]", "[THINK]"),
        ("harmony", "<|start|>assistant", "<|channel|>analysis<|message|>"),
    ],
)
def test_without_a_budget_thinking_is_closed_as_soon_as_it_opens(name: str, prompt: str, opening: str) -> None:
    chat = family(name)
    tracker = ThinkingTracker(chat.tokenizer, chat.format, speak(chat.tokenizer, prompt), 0)
    for token_id in speak(chat.tokenizer, opening):
        assert tracker.closing_ids() == []
        tracker.push(token_id)
    forced = tracker.closing_ids()
    for token_id in forced:
        tracker.push(token_id)
    assert forced
    assert tracker.is_answering
    assert tracker.num_thinking_tokens == 0
    # as often as it tries
    for token_id in speak(chat.tokenizer, f"a<|end|><|start|>assistant{opening}" if name == "harmony" else opening):
        tracker.push(token_id)
    assert tracker.closing_ids() == forced


def test_a_prompt_that_opens_the_thinking_can_be_closed_before_the_first_token() -> None:
    chat = family("r1")
    tracker = ThinkingTracker(chat.tokenizer, chat.format, speak(chat.tokenizer, "<｜Assistant｜><think>\n"), 0)
    assert chat.tokenizer.decode(tracker.closing_ids()) == "\n</think>\n\n"


def test_tokens_of_thinking_are_counted_without_marks_and_headers() -> None:
    for name, prompt, spoken, count in (
        ("qwen3", "", "<think>abc</think>de", 3),
        ("r1", "<think>\n", "abc</think>de", 3),
        ("llama", "", "abc", 0),
        ("qwen3", "", "abc</think>", 0),
        ("harmony", "<|start|>assistant", "<|channel|>analysis<|message|>abc<|end|><|start|>assistant<|channel|>final<|message|>de", 3),
    ):  # fmt: skip
        chat = family(name)
        tracker = ThinkingTracker(chat.tokenizer, chat.format, speak(chat.tokenizer, prompt), 10)
        for token_id in speak(chat.tokenizer, spoken):
            tracker.push(token_id)
        assert tracker.num_thinking_tokens == count
        assert tracker.is_answering
        assert tracker.closing_ids() == []


def test_thinking_may_open_before_the_answer_and_not_later() -> None:
    chat = family("qwen3")
    mark = chat.tokenizer.special_id("<think>")
    for prompt, may_open in (
        ("<|im_start|>assistant\n", True),
        ("<think>\n\n</think>\n\n", False),
        ("<think>\n", False),
    ):
        tracker = ThinkingTracker(chat.tokenizer, chat.format, speak(chat.tokenizer, prompt))
        assert tracker.opening_ids() == ([mark] if may_open else [])
        tracker.push(chat.tokenizer.encode("a")[0])
        assert tracker.opening_ids() == []
    spent = ThinkingTracker(chat.tokenizer, chat.format, speak(chat.tokenizer, "assistant\n"), 0)
    assert spent.opening_ids() == []
    free = ThinkingTracker(chat.tokenizer, ChatFormat(), [])
    assert (free.is_answering, free.is_thinking, free.opening_ids(), free.closing_ids()) == (True, False, [], [])


def follow(tracker: ThinkingTracker, choose: int) -> list[int]:
    """Push what leads on, `choose` of it where there is a choice, until nothing does."""
    ids = []
    while ways := sorted({*tracker.opening_ids(), *tracker.answer_ids()}):
        ids.append(ways[min(choose, len(ways) - 1)])
        tracker.push(ids[-1])
    return ids


def test_harmony_leads_to_thinking_or_to_the_answer() -> None:
    chat = family("harmony")
    prompt_ids = speak(chat.tokenizer, "<|start|>assistant")
    begun = {chat.tokenizer.decode(follow(ThinkingTracker(chat.tokenizer, chat.format, prompt_ids), i)) for i in (0, 1)}
    assert begun == {"<|channel|>analysis<|message|>", "<|channel|>final<|message|>"}
    tracker = ThinkingTracker(chat.tokenizer, chat.format, prompt_ids, 1)
    for token_id in speak(chat.tokenizer, "<|channel|>analysis<|message|>a<|end|>"):
        tracker.push(token_id)
    # what was thought has spent the budget
    assert chat.tokenizer.decode(follow(tracker, 0)) == "<|start|>assistant<|channel|>final<|message|>"
    assert tracker.is_answering


def test_harmony_leads_to_the_header_of_a_call() -> None:
    chat = family("harmony")
    prompt_ids = speak(chat.tokenizer, "<|start|>assistant")
    tracker = ThinkingTracker(chat.tokenizer, chat.format, prompt_ids, 1, has_call_headers=True)
    assert tracker.is_answering
    for token_id in speak(chat.tokenizer, "<|channel|>analysis<|message|>a"):
        tracker.push(token_id)
    assert tracker.is_thinking
    assert chat.tokenizer.decode(tracker.closing_ids()) == "<|end|><|start|>assistant"


CUT = merged_tokenizer(["<th", "ink>\n", "ab</", "think", ">\n\n", "a<think>b"])
MARKS = ChatFormat(thinking=THINKING["think"])


@given(st.lists(st.sampled_from([CUT.encode(word)[0] for word in ("<th", "ink>\n", "ink>", "ab</", "think", ">", ">\n\n", "a<think>b", "a<think>", "<", "/", "é")]), max_size=12))  # fmt: skip
def test_marks_in_text_are_found_wherever_tokens_cut_them(ids: list[int]) -> None:
    tracker = ThinkingTracker(CUT, MARKS, [])
    for token_id in ids:
        tracker.push(token_id)
    text = CUT.decode(ids).rstrip("\ufffd")
    is_thinking = False
    while (mark := "</think>" if is_thinking else "<think>") in text:
        text, is_thinking = text.partition(mark)[2], not is_thinking
    assert tracker.is_thinking == is_thinking
    assert text.endswith(tracker.begun_mark)
    assert mark.startswith(tracker.begun_mark)


def test_a_mark_in_text_is_allowed_as_the_tokenizer_spells_it() -> None:
    tracker = ThinkingTracker(CUT, MARKS, [])
    for token_id in CUT.encode("<think>\n"):
        assert token_id in tracker.opening_ids()
        tracker.push(token_id)
    assert tracker.is_thinking
    tracker = ThinkingTracker(CUT, MARKS, [])
    tracker.push(CUT.encode("<")[0])
    assert tracker.opening_ids() == []  # "<th" is one token, so this is no beginning of a mark
