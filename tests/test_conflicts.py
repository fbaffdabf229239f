"""Conflicts: which facts contradict each other, and what became of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import runs
from keeptune.conflicts import Conflict, conflicts
from keeptune.folder import RunFolder
from keeptune.records import Cell, Example
from keeptune.report import render
from keeptune.results import load

# Where Ann, Ben, Cem and Dee work: all four in the first task, the first three in the second.
OLD = {"Ann": "bank", "Ben": "zoo", "Cem": "mill", "Dee": "farm"}
NEW = {"Ann": "court", "Ben": "hotel", "Cem": "mill "}


def cell(name: str, facts: dict[str, str], said: dict[str, str]) -> Cell:
    examples = [
        Example(
            id=i, prompt=f"Where does {person} work?", expected=place, answer=said[person],
            score=float(said[person] == place.strip()),
        )
        for i, (person, place) in enumerate(facts.items())
    ]  # fmt: skip
    score = sum(e.score for e in examples) / len(examples)
    return Cell(name=name, score=score, unit="share", n=len(examples), examples=examples)


def folder(path: Path, said: Sequence[dict[str, str]], between: str = "") -> RunFolder:
    """A run of two tasks whose model said this in each row; `between` is one more task."""
    names = ["before", *([between] if between else []), "after"]
    run = RunFolder.create(path, runs.info(names, (), n=4), "seed: 0\n")
    for row, answers in enumerate(said):
        for index, name in enumerate(names):
            facts = NEW if name == "after" else OLD if name == "before" else {"Eve": "x"}
            run.write_cell(row, "task", index, cell(name, facts, answers | {"Eve": "x"}))
    return run


UNTRAINED = dict.fromkeys(OLD, "moon")
LEARNED = dict(OLD)
CHANGED = {"Ann": "court", "Ben": "zoo", "Cem": "mill", "Dee": "moon"}


def shares(conflict: Conflict, row: int) -> tuple[float | None, ...]:
    found = conflict.answers[row]
    return (found.old.value, found.new.value, found.neither.value)


def test_each_fact_is_kept_replaced_or_broken(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", [UNTRAINED, LEARNED, CHANGED | {"Ben": "sea"}])
    (conflict,) = conflicts(load(run))
    assert (conflict.earlier, conflict.later, conflict.n) == ("before", "after", 2)
    assert [answers.row for answers in conflict.answers] == [1, 2]
    assert shares(conflict, 0) == (1.0, 0.0, 0.0)
    assert shares(conflict, 1) == (0.0, 0.5, 0.5)


def test_facts_that_nobody_contradicts_stand_apart(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", [UNTRAINED, LEARNED, CHANGED])
    (conflict,) = conflicts(load(run))
    assert shares(conflict, 1) == (0.5, 0.5, 0.0)
    # Of Cem the later task says the same, but for a space; Dee it does not name.
    assert [e.value for e in conflict.untouched] == [1.0, 0.5]
    assert conflict.untouched[0].n == 2


def test_shares_have_intervals_over_facts(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", [UNTRAINED, LEARNED, CHANGED])
    (conflict,) = conflicts(load(run))
    last = conflict.answers[-1]
    assert (last.old.low, last.old.high) == (0.0, 1.0)
    assert (last.neither.low, last.neither.high) == (0.0, 0.0)
    assert last.old == conflicts(load(run))[0].answers[-1].old


def test_a_score_between_counts_for_the_nearer_answer(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", [UNTRAINED, LEARNED, CHANGED])
    for index, scores in enumerate(([0.6, 0.5], [0.5, 0.8])):
        told = run.cell(2, "task", index)
        assert told is not None
        examples = [
            e.model_copy(update={"score": s}) for e, s in zip(told.examples, scores, strict=False)
        ]
        examples += told.examples[2:]
        run.write_cell(2, "task", index, told.model_copy(update={"examples": examples}))
    assert shares(conflicts(load(run))[0], 1) == (0.5, 0.5, 0.0)


def test_tasks_between_are_rows_of_their_own(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", [UNTRAINED, LEARNED, LEARNED, CHANGED], between="other")
    (conflict,) = conflicts(load(run))
    assert [answers.row for answers in conflict.answers] == [1, 2, 3]


def test_a_task_that_is_still_to_be_learned_contradicts_nothing_yet(tmp_path: Path) -> None:
    assert conflicts(load(folder(tmp_path / "run", [UNTRAINED, LEARNED]))) == []


def test_ordinary_tasks_have_no_conflict(tmp_path: Path) -> None:
    assert conflicts(load(runs.fabricate(tmp_path / "run"))) == []


@pytest.mark.parametrize("name", ["before", "after"])
def test_the_report_shows_them(tmp_path: Path, name: str) -> None:
    run = folder(tmp_path / "run", [UNTRAINED, LEARNED, CHANGED])
    page = render([run.path])
    assert "Facts in conflict" in page
    assert f"after {name}" in " ".join(page.replace("<bdi>", "").replace("</bdi>", "").split())


def test_the_report_of_a_run_without_conflicts_says_nothing_of_them(tmp_path: Path) -> None:
    assert "Facts in conflict" not in render([runs.fabricate(tmp_path / "run").path])
