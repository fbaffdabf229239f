"""Scores, by hand on few words."""

from __future__ import annotations

import math

import pytest

from keeptune.errors import DataError
from keeptune.records import Example
from keeptune.rows import Shape, read_rows
from keeptune.scorers import (
    DEFAULTS,
    cell_score,
    check_score,
    exact_match,
    rouge_l,
    text_score,
    token_f1,
    unit,
)

PAIR = read_rows([{"prompt": "q", "completion": "a"}])


@pytest.mark.parametrize(
    ("got", "expected", "score"),
    [("  New\nYork ", "new york", 1), ("New York.", "New York", 0), ("", "", 0), (" ", " ", 0)],
)
def test_exact_match_ignores_case_and_white_space_only(got, expected, score):
    assert exact_match(got, expected) == score


def test_token_f1_is_that_of_squad():
    # 2 common words, 3 answered, 4 expected: P = 2/3, R = 1/2, F1 = 4/7
    assert token_f1("The big, red dog", "a red dog sat down") == pytest.approx(4 / 7)
    assert token_f1("cat cat", "cat") == pytest.approx(2 / 3)
    assert token_f1("the", "the") == 0
    assert token_f1("", "x") == 0


def test_rouge_l_counts_the_longest_common_subsequence():
    # "police the gunman" is 3 of 4 and 4 words; "the gunman" 2 (Lin 2004, section 3.1)
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(2 / 4)
    assert rouge_l("Paris!", "it is paris") == pytest.approx(2 * 1 / 4)
    assert rouge_l("", "") == 0


def test_a_perplexity_beyond_all_numbers_is_infinite():
    rows = [Example(id=0, prompt="", expected="", answer="", score=1e3, weight=2)]
    assert cell_score(rows, "perplexity") == float("inf")
    assert math.isnan(cell_score([], "perplexity"))


def test_units_and_defaults():
    assert (unit("perplexity"), unit("choice"), unit("a.b:c")) == ("perplexity", "share", "share")
    assert set(DEFAULTS) == set(Shape)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("exact_mach", "unknown score 'exact_mach'. Did you mean 'exact_match'?"),
        ("accuracy", "score 'accuracy' fits rows of the shape label, but a list of 1 rows has"),
        ("choice", "needs a column `choices` that holds the right answer; 1 of 1 rows"),
        ("no.such.module:f", "score 'no.such.module:f' cannot be imported"),
        ("json:no_such", "cannot be imported .AttributeError"),
        ("json:decoder", "is no function but module"),
    ],
)
def test_a_score_that_cannot_be_is_one_sentence(score, message):
    with pytest.raises(DataError, match=message):
        check_score(score, PAIR)


def test_text_has_only_a_perplexity():
    text = read_rows([{"text": "a"}])
    check_score("perplexity", text)
    with pytest.raises(DataError, match="for which 'perplexity' is the usual one"):
        check_score("exact_match", text)


def test_an_own_function_sees_answer_and_row(tmp_path, monkeypatch):
    source = "def half(answer, row): return 0.5 * (answer == row['extra'])\n"
    source += "def wild(answer, row): return 2\ndef bad(answer, row): return row['nothing']\n"
    (tmp_path / "my_scores.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    row = {"prompt": "q", "completion": "a", "extra": "x"}
    check_score("my_scores:half", PAIR)
    assert text_score("my_scores:half", Shape.COMPLETION)("x", row) == 0.5
    with pytest.raises(DataError, match=r"gave 2.0; it must give a number from 0 to 1"):
        text_score("my_scores:wild", Shape.COMPLETION)("x", row)
    with pytest.raises(DataError, match="failed on the answer 'x': KeyError"):
        text_score("my_scores:bad", Shape.COMPLETION)("x", row)


def test_a_module_that_breaks_on_import_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "broken_scores.py").write_text("1/0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match=r"cannot be imported \(ZeroDivisionError"):
        check_score("broken_scores:f", PAIR)
