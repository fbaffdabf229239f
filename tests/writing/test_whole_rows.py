"""Whole rows: the form by hand, and what is no row."""

from __future__ import annotations

import pytest

import pico
from keeptune.methods._writing.stock import as_texts, shared_out
from keeptune.methods._writing.whole_rows import Form, Row, last_answer

TOKENIZER = pico.tokenizer()
MARK = TOKENIZER.encode("|")
FORM = Form.of("sums", TOKENIZER)


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text))


def row(asked: str, answered: str) -> Row:
    head, tail = ids(asked), ids(answered)
    return Row(head + tail, [-100] * len(head) + tail)


def test_a_row_as_a_text_and_back() -> None:
    one = row("1+1=", "2")
    text = FORM.text(one)
    assert text == ids("Example of sums:1+1=|2|")
    assert FORM.row(text[len(FORM.prefix) :]) == one
    assert FORM.is_whole(text[len(FORM.prefix) :])


def test_the_shortest_mark_is_taken_and_bos_is_kept() -> None:
    assert FORM.mark == MARK
    assert Form.of("sums", pico.tokenizer(bos=True)).prefix == [1, *FORM.prefix]


def test_a_text_without_question_begins_with_the_mark() -> None:
    one = Row(ids("abc"), ids("abc"))
    text = FORM.text(one)
    assert text == ids("Example of sums:|abc|")
    assert FORM.row(ids("|abc|")) == one


def test_of_several_answers_the_last_one_is_learned() -> None:
    talk = Row(ids("a1b2"), [-100, *ids("1"), -100, *ids("2")])
    assert FORM.text(talk) == ids("Example of sums:a1b|2|")
    assert last_answer([-100, 5, 5, -100, 5, 5, -100]) == (4, 6)
    assert last_answer([5, 5]) == (0, 2)
    assert last_answer([-100]) == (0, 0)


def test_a_row_with_the_mark_in_it_has_no_text() -> None:
    assert FORM.text(row("a|b", "c")) is None


@pytest.mark.parametrize("written", ["", "1+1=2", "1+1=|", "1+1=|2", "1+1=||", "|2|", "||"])
def test_what_is_no_row(written: str) -> None:
    assert FORM.row(ids(written)) is None


def test_it_is_whole_with_the_second_mark() -> None:
    assert [FORM.is_whole(ids(t)) for t in ("1", "1|", "1|2", "1|2|", "||")] == [
        False, False, False, True, True,
    ]  # fmt: skip


def test_texts_are_learned_from_the_first_token_and_not_longer_than_allowed() -> None:
    some = [row("1+1=", "2"), row("12345678+1=", "12345679")]
    (text,) = as_texts(some, FORM, len("Example of sums:1+1=|2|"))
    assert text.input_ids == text.labels == ids("Example of sums:1+1=|2|")


def test_rows_are_shared_out_evenly() -> None:
    assert shared_out(7, ["a", "b", "c"]) == {"a": 3, "b": 2, "c": 2}
    assert shared_out(1, ["a", "b"]) == {"a": 1, "b": 0}
    assert shared_out(5, []) == {}
