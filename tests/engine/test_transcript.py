"""Text from tokens: stop strings and pieces, wherever the tokens cut them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from openbook.engine.transcript import StopStrings, Transcript
from openbook.tokenizer.tokenizer import Tokenizer

few_letters = st.text(alphabet="ab.", max_size=12)


@given(st.lists(few_letters, max_size=8), st.lists(few_letters.filter(bool), max_size=3))
def test_a_text_in_pieces_is_cut_where_the_whole_text_would_be(pieces: list[str], stop: list[str]) -> None:
    whole = "".join(pieces)
    stops = StopStrings(stop)
    shown = ""
    is_stopped = False
    for piece in pieces:
        if not is_stopped:
            new, is_stopped = stops.feed(piece)
            shown += new
            # nothing shown is taken back, and no stop string is ever on the screen
            assert whole.startswith(shown)
            assert not any(string in shown for string in stop)
    if not is_stopped:
        shown += stops.flush()
        assert shown == whole
    else:
        assert any(whole.startswith(string, len(shown)) for string in stop)


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_comes_out_as_it_was_spoken(tiny_tokenizer: Tokenizer, reasoning: str, answer: str) -> None:
    transcript = Transcript(tiny_tokenizer)
    marks = [tiny_tokenizer.special_id("<think>")], [tiny_tokenizer.special_id("</think>")]
    spoken = [*marks[0], *tiny_tokenizer.encode(reasoning), *marks[1], *tiny_tokenizer.encode(answer)]
    pieces = [piece for token_id in spoken for piece in transcript.push(token_id)]
    assert not transcript.is_stopped
    pieces += transcript.push(next(iter(tiny_tokenizer.stop_ids)))
    assert transcript.is_stopped
    # line breaks before a part belong to the marks of some families
    assert transcript.reasoning == reasoning.lstrip("\n")
    assert transcript.text == answer.lstrip("\n")
    assert "".join(piece.text for piece in pieces if piece.kind == "reasoning") == transcript.reasoning
    assert "".join(piece.text for piece in pieces if piece.kind == "answer") == transcript.text


def test_control_tokens_are_not_shown(tiny_tokenizer: Tokenizer) -> None:
    transcript = Transcript(tiny_tokenizer)
    for token_id in (tiny_tokenizer.special_id("<|user|>"), *tiny_tokenizer.encode("ok")):
        transcript.push(token_id)
    transcript.close()
    assert transcript.text == "ok"
