from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.errors import InvalidRequest
from kvservice.worker.answer import AnswerText
from tests.unit.worker.scripted_engine import ToyTokenStream


class PieceStream:
    """Token `i` is piece `i` of a text; what comes after the last token is flushed."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self._pieces = pieces
        self._rest = rest

    def push(self, token_id: int) -> str:
        return self._pieces[token_id]

    def flush(self) -> str:
        return self._rest


def shown_texts(pieces: list[str], stop: list[str], rest: str = "") -> tuple[list[str], bool]:
    answer = AnswerText(PieceStream(pieces, rest), stop)
    shown = [answer.push(token_id) for token_id in range(len(pieces))]
    return [*shown, answer.finish()], answer.stopped


def cut_at_first_stop(text: str, stop: list[str]) -> str:
    """The oracle: reads character by character and cuts before the stop string that is complete first."""
    for end in range(len(text) + 1):
        complete = [len(word) for word in stop if text[:end].endswith(word)]
        if complete:
            return text[: end - max(complete)]
    return text


def test_text_without_stop_strings_is_shown_at_once():
    assert shown_texts(["ab", "c"], []) == (["ab", "c", ""], False)


def test_a_possible_beginning_of_a_stop_string_is_held_back_until_it_is_none():
    assert shown_texts(["a\n", "b"], ["\n\n"]) == (["a", "\nb", ""], False)


def test_a_stop_string_across_tokens_is_cut_and_nothing_follows():
    assert shown_texts(["hello EN", "D. And", " more"], ["END."]) == (["hello ", "", "", ""], True)


def test_held_back_text_is_shown_at_the_end():
    assert shown_texts(["wait EN"], ["END"]) == (["wait ", "EN"], False)


def test_a_stop_string_that_the_flush_completes_is_cut():
    assert shown_texts(["fin EN"], ["END"], rest="D!") == (["fin ", ""], True)


def test_of_overlapping_stop_strings_the_first_complete_one_counts():
    assert shown_texts(["abcd"], ["abcd", "bc"]) == (["a", ""], True)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InvalidRequest, match="empty string"):
        AnswerText(ToyTokenStream(), ["a", ""])


@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=12),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    rest=st.text("ab", max_size=2),
)
def test_shown_text_is_the_whole_text_cut_at_the_first_stop_string(pieces, stop, rest):
    whole = "".join(pieces) + rest
    shown, stopped = shown_texts(pieces, stop, rest)
    assert "".join(shown) == cut_at_first_stop(whole, stop)
    assert stopped == any(word in whole for word in stop)
    assert not any(word in "".join(shown) for word in stop)
