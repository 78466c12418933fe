from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from openbook.tokenizer.parse import ReasoningSplitter, split_reasoning


def test_whole_text() -> None:
    assert split_reasoning("<think>2 + 2</think>4") == ("2 + 2", "4")
    assert split_reasoning("4") == ("", "4")
    assert split_reasoning("<think>2 +") == ("2 +", "")
    assert split_reasoning("2 + 2</think>4", starts_in_reasoning=True) == ("2 + 2", "4")
    assert split_reasoning("[T]a[/T]b", "[T]", "[/T]") == ("a", "b")


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "thi", "nk>", "a", "<<think>"]), max_size=8), st.data()
)
def test_pieces_cut_anywhere_give_the_same(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    splitter = ReasoningSplitter()
    pieces = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        pieces += splitter.feed(text[start:end])
    pieces += splitter.flush()
    reasoning, answer = ("".join(p for k, p in pieces if k == kind) for kind in ("reasoning", "answer"))
    assert (reasoning, answer) == split_reasoning(text)


def test_nothing_is_held_back_longer_than_needed() -> None:
    splitter = ReasoningSplitter()
    assert splitter.feed("<thi") == []
    assert splitter.feed("nk>a<") == [("reasoning", "a")]
    assert splitter.feed("b") == [("reasoning", "<b")]
    assert splitter.feed("</think>4") == [("answer", "4")]
    assert splitter.feed("<") == []
    assert splitter.flush() == [("answer", "<")]
