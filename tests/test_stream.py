"""Tasks, their order, their names, their leaks; and the toy stream."""

from __future__ import annotations

import pytest

from keeptune.errors import DataError, RecipeError
from keeptune.rows import Rows, read_rows
from keeptune.stream import Task, TaskStream, learned_by_heart
from keeptune.streams import toy


def pairs(*prompts: str) -> Rows:
    return read_rows([{"prompt": p, "completion": p.upper()} for p in prompts])


def test_a_task_has_the_usual_score_of_its_rows():
    assert Task("a", pairs("x"), pairs("y")).score == "exact_match"
    text = Task("b", pairs("x"), read_rows([{"text": "t"}]))
    assert (text.score, text.unit) == ("perplexity", "perplexity")


@pytest.mark.parametrize("name", ["<script>", "ein Überblick / 2", "税", "x" * 80, "../.."])
def test_a_name_is_anything_printable(name):
    assert Task(name, pairs("x"), pairs("y")).name == name


@pytest.mark.parametrize("name", ["", " ", "x" * 81, "a\nb", "a\x00"])
def test_other_names_are_refused(name):
    with pytest.raises(RecipeError, match="cannot name a task"):
        Task(name, pairs("x"), pairs("y"))


def test_a_score_must_fit():
    with pytest.raises(DataError, match="needs a column `choices`"):
        Task("a", pairs("x"), pairs("y"), "choice")
    with pytest.raises(RecipeError, match="with labels, both must have them"):
        Task("a", pairs("x"), read_rows([{"text": "t", "label": 1}]))


def test_a_stream_keeps_its_order_and_refuses_a_task_twice():
    one, two = Task("b", pairs("x"), pairs("y")), Task("a", pairs("p"), pairs("q"))
    stream = TaskStream([one, two])
    assert list(stream) == [one, two]
    assert (len(stream), stream[1], repr(stream)) == (2, two, "TaskStream(b, a)")
    with pytest.raises(RecipeError, match="task 'a' is there twice"):
        TaskStream([one, two, two])
    with pytest.raises(RecipeError, match="at least one"):
        TaskStream([])


def test_leaks_are_told_with_their_count():
    stream = TaskStream(
        [Task("a", pairs("1", "2"), pairs("2", "3")), Task("b", pairs("3", "2"), pairs("4"))]
    )
    within, across = stream.leaks()
    assert within.startswith("1 of 2 evaluation rows of task 'a'")
    assert "the same task" in within
    assert across.startswith("2 of 2 evaluation rows of task 'a'")
    assert "training rows of task 'b'" in across


def test_the_toy_stream_is_right_disjoint_and_the_same_each_time():
    stream = toy.stream()
    assert [task.name for task in stream] == ["reverse", "next", "sort"]
    assert [(len(t.train), len(t.eval)) for t in stream] == [(200, 100)] * 3
    assert stream.leaks() == []
    assert [t.train.sha256 for t in toy.stream()] == [t.train.sha256 for t in stream]
    assert [t.train.sha256 for t in toy.stream(seed=1)] != [t.train.sha256 for t in stream]
    said = {name: function("hac") for name, function in toy.MAPPINGS.items()}
    assert said == {"reverse": "cah", "next": "abd", "sort": "ach"}
    row = stream[0].train.rows[0]
    word = row["prompt"].removeprefix("reverse ").removesuffix(":")
    assert row["completion"] == " " + word[::-1]


def test_rows_of_a_guard_that_some_task_learns_are_counted_once():
    pairs = [{"prompt": p, "completion": "x"} for p in "abcde"]
    data = [read_rows(pairs[:2]), read_rows(pairs[1:3]), read_rows(pairs[3:])]
    tasks = [Task(str(i), rows, data[2], recall=True) for i, rows in enumerate(data[:2])]
    assert learned_by_heart(read_rows(pairs), tasks) == 3
    assert learned_by_heart(data[2], tasks) == 0
