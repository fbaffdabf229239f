"""Watching and the budget in the report: each curve has its name and its table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import runs
from keeptune import watchlog
from keeptune.checks import run_checks
from keeptune.folder import RunFolder
from keeptune.report import render
from keeptune.report.steered import budget_views, watch_view
from keeptune.watchlog import Frontier, Look, Point, Tried
from test_report import SCRIPT, Page


def point(name: str, role: Any, change: float = 0.0, **more: Any) -> Point:
    unit = runs.unit(name)
    fields: dict[str, Any] = {
        "n": 64, "score": 14.0 if unit == "perplexity" else 0.5 + change, "change": change,
        "low": change - 0.02, "high": change + 0.02, "is_below": False,
        "allowed": None if role == "learning" else 0.01,
    }  # fmt: skip
    return Point(name=name, role=role, unit=unit, **(fields | more))


def look(task: str, index: int, step: int, *points: Point, **more: Any) -> Look:
    return Look(
        task=task, index=index, step=step, steps=100, seconds=1.0, overhead=0.07,
        points=list(points), **more,
    )  # fmt: skip


def steered(path: Path, guard: str = "capitals") -> RunFolder:
    folder = runs.fabricate(path, runs.info(("a", "b"), (guard, "old news"), [runs.EWC]))
    for index, task in enumerate(("a", "b")):
        for step in (0, 50, 100):
            points = [point(task, "learning", step / 250), point(guard, "guard", -step / 500)]
            points += [point("a", "task", -0.1)] * index + [point("old news", "guard")]
            watchlog.add(folder, look(task, index, step, *points))
    fallen = [point("b", "learning", 0.1), point(guard, "guard", -0.2, is_below=True)]
    watchlog.add(folder, look("b", 1, 120, *fallen, action="rollback", back_to=100))
    tried = [
        Tried(
            mix=mix, sample="fresh" if fresh else "search", inside=inside,
            points=[point("b", "learning", 0.4 * mix), point("old news", "guard", -0.1 * mix)],
        )
        for mix, fresh, inside in ((1.0, 0, False), (0.5, 0, True), (0.5, 1, True))
    ]  # fmt: skip
    frontier = Frontier(task="b", index=1, mix=0.5, cut=0.0, tried=tried, seconds=9.0)
    watchlog.write_frontier(folder, frontier)
    return folder


def test_curves_and_tables_of_a_watched_run(tmp_path: Path) -> None:
    folder = steered(tmp_path / "run")
    html = render([folder.path])
    words = Page(html).words
    for said in (
        "Watched while learning",
        "Looks took at most 7 %",
        "Task b, step 120: capitals fell below the line; the task ended there, with the weights "
        "of step 100.",
        "What the budget allowed",
        "50 % of the step was taken",
        "What it knew before",
    ):
        assert said in words.replace("\u00a0", " ")
    summaries = re.findall(r"<summary>Table: ([^<]+)<", html)
    assert any("watched scores" in s for s in summaries)
    assert "steps tried after b" in summaries
    page = Page(html)
    ids = {a["id"] for _, a in page.tags if "id" in a}
    for figure in [a for t, a in page.tags if t == "svg" and a.get("role") == "img"]:
        names = (figure.get("aria-labelledby") or "").split()
        assert figure.get("aria-label") or (names and set(names) <= ids)


def test_where_the_marks_stand(tmp_path: Path) -> None:
    folder = steered(tmp_path / "run")
    shown = watch_view(folder)
    assert shown is not None
    assert [curve.name for curve in shown.curves] == ["a", "capitals", "old news", "b"]
    first = shown.curves[0]
    # Task b was ended at its step 120 after the 100 of task a.
    assert [dot.x for dot in first.dots[:3]] == [0.0, 22.73, 45.45]
    assert first.cuts == [45.45]
    assert [dot.y for dot in first.dots[:3]] == [50.0, 30.0, 10.0]
    assert len(first.lines) == 2
    guard = shown.curves[1]
    assert [dot.is_sure for dot in guard.dots] == [True] * 6 + [False]
    assert len(shown.rows) == 7
    assert shown.rows[-1][-1] == "rollback"
    (budget,) = budget_views(folder)
    learned, lost = budget.curves
    assert learned.limit is None
    assert lost.limit is not None
    assert [dot.x for dot in learned.dots] == [0.0, 50.0, 50.0, 100.0]
    zero = lost.dots[0].y
    assert zero < lost.dots[-1].y, "what is lost points down"
    assert learned.dots[0].y > learned.dots[-1].y, "what is learned points up"
    assert [row[-1] for row in budget.rows] == ["no", "yes", "yes"]


def test_how_hard_the_methods_held_is_a_curve_with_its_table(tmp_path: Path) -> None:
    folder = runs.fabricate(tmp_path / "run", runs.info(("a", "b"), ("capitals",), [runs.EWC]))
    efforts = ((0, 0, 1.0), (0, 50, 10.0), (0, 100, 100.0), (1, 0, 1.0), (1, 100, 2.5))
    for index, step, effort in efforts:
        seen = point("capitals", "guard", is_below=effort == 100)
        acted = {"action": "strengthen"} if seen.is_below else {}
        watchlog.add(folder, look("ab"[index], index, step, seen, effort=effort, **acted))
    shown = watch_view(folder)
    assert shown is not None
    assert shown.is_steered
    held = shown.curves[-1]
    assert (held.name, held.cuts) == ("how hard the methods hold", [50.0])
    assert [dot.y for dot in held.dots] == [100.0, 50.0, 0.0, 100.0, 80.1]
    assert held.lines == ["0.0,100.0 25.0,50.0 50.0,0.0", "50.0,100.0 100.0,80.1"]
    assert shown.heads == ["task", "step", "capitals", "how hard the methods hold", "action"]
    assert [row[-2].replace("\u00a0", " ") for row in shown.rows] == [
        "1 ×", "10 ×", "100 ×", "1 ×", "2.5 ×",
    ]  # fmt: skip
    words = Page(render([folder.path])).words.replace("\u00a0", " ")
    assert "capitals fell below the line; the methods held 100 × as hard from there on" in words
    assert "The methods held as hard as kept all inside" in words
    (said,) = (f.message for f in run_checks(folder) if f.code == "KT012")
    assert said == "'capitals' fell at step 100 of 100 of task 'a'."


def test_the_steps_of_blocks_are_a_curve_and_a_row(tmp_path: Path) -> None:
    folder = steered(tmp_path / "run")
    (before,) = watchlog.frontiers(folder)
    apart = before.tried[-1].model_copy(update={"mix": 0.75, "mixes": [0.5, 1.0]})
    whole = {"tried": [*before.tried, apart], "mix": 0.75, "mixes": [0.5, 1.0]}
    watchlog.write_frontier(folder, before.model_copy(update=whole))
    (budget,) = budget_views(folder)
    assert budget.taken == "50 / 100\u00a0%"
    *others, blocks = budget.curves
    assert [(dot.x, dot.y) for dot in blocks.dots] == [(25.0, 50.0), (75.0, 0.0)]
    assert all(len(curve.dots) == 4 for curve in others), "the others are of all layers alike"
    assert budget.rows[-1][0] == "50 / 100\u00a0%"
    words = Page(render([folder.path])).words.replace("\u00a0", " ")
    assert "50 / 100 % of the step was taken" in words
    assert "the step of each block" in words


def test_a_run_that_is_not_watched_shows_nothing_of_it(tmp_path: Path) -> None:
    folder = runs.fabricate(tmp_path / "run")
    assert watch_view(folder) is None
    assert budget_views(folder) == []
    assert "Watched" not in Page(render([folder.path])).words
    assert not {"KT012", "KT013"} & {f.code for f in run_checks(folder)}


def test_names_are_escaped(tmp_path: Path) -> None:
    html = render([steered(tmp_path / "run", guard=f"\"'>{SCRIPT}").path])
    assert "script" not in {tag for tag, _ in Page(html).tags}


def test_checks_tell_what_was_done(tmp_path: Path) -> None:
    found = {f.code: f.message for f in run_checks(steered(tmp_path / "run"))}
    assert found["KT012"] == (
        "Task 'b' ended at step 120 of 100 with the weights of step 100, because 'capitals' fell."
    )
