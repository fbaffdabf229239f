"""What a recipe's data must be, before any model is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import pico
from keeptune.errors import DataError, KeeptuneError, RecipeError
from keeptune.inputs import read_sources
from keeptune.recipe import parse_recipe
from keeptune.rows import read_rows
from keeptune.stream import Task, class_names


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def rows(home: Path, name: str, of: list[dict[str, Any]]) -> str:
    return pico.write_rows(home / f"{name}.jsonl", of)


def classes(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


def read(home: Path, **changes: Any) -> Any:
    facts = rows(home, "facts-of-mine", pico.questions(0, 8))
    task = {"name": "t0", "train": facts, "eval": facts}
    return read_sources(parse_recipe({"model": "none", "tasks": [task], **changes}))


def refused(home: Path, error: type[KeeptuneError], words: str, **changes: Any) -> None:
    with pytest.raises(error, match=words):
        read(home, **changes)


def test_names_differ_when_groups_are_written_out(home: Path) -> None:
    own = {"name": "capitals", "eval": rows(home, "own", pico.questions(1, 8))}
    words = "'capitals' is the name of a guard and of a guard"
    refused(home, RecipeError, words, guards=["facts", own])
    refused(home, RecipeError, words, guards=["facts", "capitals"])
    task = {"name": "capitals", "train": own["eval"], "eval": own["eval"]}
    refused(
        home, RecipeError, "'capitals' is the name of a task and", tasks=[task], guards=["facts"]
    )


def test_guards_must_be_of_the_models_kind(home: Path) -> None:
    labelled = rows(home, "labelled", classes("yes", "no"))
    refused(
        home,
        DataError,
        "Guard 'g' has rows of the shape 'label'",
        guards=[{"name": "g", "eval": labelled}],
    )
    task = {"name": "c", "train": labelled, "eval": labelled}
    kind = {"kind": "classification", "tasks": [task]}
    refused(home, DataError, "'capitals' has rows of the shape", guards=["capitals"], **kind)


def test_transfer_is_of_a_task(home: Path) -> None:
    guard = {"name": "g", "eval": rows(home, "own", pico.questions(1, 8)), "transfer_of": "t1"}
    refused(
        home,
        RecipeError,
        "transfer_of: t1, but no task is called so. Allowed: t0.",
        guards=[guard],
    )


def test_lm_eval_is_there_before_it_is_needed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    refused(home, DataError, "needs lm-eval: pip install", guards=[{"lm_eval": ["arc_easy"]}])


def test_every_label_is_a_class(home: Path) -> None:
    train, other = rows(home, "a", classes("yes", "no")), rows(home, "b", classes("yes", "maybe"))
    task = {"name": "c", "train": train, "eval": other}
    kind: dict[str, Any] = {"kind": "classification", "tasks": [task]}
    read(home, **kind)
    words = "row 2 of .*b.jsonl: unknown label 'maybe'. Allowed: no, yes."
    refused(home, DataError, words, labels=["yes", "no"], **kind)
    kind["tasks"] = [{"name": "c", "train": train, "eval": train}]
    refused(home, DataError, words, guards=[{"name": "g", "eval": other}], **kind)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("b", "a", "b"), ["b", "a"]),
        ((10, 2, 1), ["1", "2", "10"]),
        (("1", "0"), ["0", "1"]),
        (("x", 1), ["x", "1"]),
    ],
)
def test_classes_are_in_the_order_of_sight_and_numbers_in_theirs(
    labels: tuple[Any, ...], names: list[str]
) -> None:
    data = read_rows(classes(*labels))
    assert class_names([], [Task("c", data, data)]) == names
    assert class_names(["own"], [Task("c", data, data)]) == ["own"]
