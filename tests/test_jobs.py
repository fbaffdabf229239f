"""The plain function under every engine: one run, its beginning and its ends."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

import runs
from keeptune.errors import TrainingError
from keeptune.failures import failure, in_a_line
from keeptune.jobs import Job, run_job

RECIPE = {"model": "demo", "tasks": [{"name": "a", "train": "a.jsonl", "eval": "a.jsonl"}]}


class Training:
    """Stands in for `keeptune.runs.run`."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.found: list[str] = []

    def __call__(self, recipe: Any, *, resume: bool, progress: Any) -> None:
        assert resume
        self.found = sorted(path.name for path in Path(recipe.out).glob("*"))
        if self.error is not None:
            raise self.error


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    module, stand_in = types.ModuleType("keeptune.runs"), Training()
    vars(module)["run"] = stand_in
    monkeypatch.setitem(sys.modules, "keeptune.runs", module)
    return stand_in


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.chdir("/")
    (tmp_path / "out").mkdir()
    return Job("a", Path("out/run"), {**RECIPE, "out": "out/run"}, tmp_path)


def test_paths_start_where_the_command_was_given(
    training: Training, job: Job, tmp_path: Path
) -> None:
    assert run_job(job) is None
    assert Path.cwd() == tmp_path


def test_what_was_killed_before_it_was_a_run_begins_anew(
    training: Training, job: Job, tmp_path: Path
) -> None:
    folder = tmp_path / "out" / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("")
    (folder / ".run.json.7.tmp").write_text("")
    run_job(job)
    assert training.found == []
    (folder / "rows").mkdir(parents=True)
    (folder / "run.json").write_text("")
    run_job(job)
    assert training.found == ["rows", "run.json"]


@pytest.mark.parametrize(
    ("error", "said", "details"),
    [
        (TrainingError("Memory is full.\nLower it."), "Memory is full.; Lower it.", ""),
        (ValueError("a bug"), "ValueError: a bug", "Traceback"),
    ],
)
def test_why_it_failed_is_kept(
    training: Training, job: Job, tmp_path: Path, error: Exception, said: str, details: str
) -> None:
    training.error = error
    assert run_job(job) == said
    assert failure(tmp_path / "out" / "run") == said
    assert details in (tmp_path / "out" / "run" / "error.txt").read_text()


def test_ctrl_c_is_no_failure(training: Training, job: Job, tmp_path: Path) -> None:
    training.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_job(job)
    assert failure(tmp_path / "out" / "run") is None


def test_how_far_a_run_is_by_its_folder(job: Job, tmp_path: Path) -> None:
    assert (job.is_done, job.share) == (False, 0.0)
    info = runs.info(["a"], status="running")
    folder = runs.fabricate(tmp_path / "out" / "run", info, R=runs.stream(["a"], 0.5, 0)[:1])
    assert (job.is_done, job.share) == (False, 0.0)
    folder.info.status = "done"
    folder.save_info()
    assert job.is_done
    (folder.path / "run.json").write_text("{")
    assert (job.is_done, job.share) == (False, 0.0)


def test_an_error_is_one_line_even_if_it_says_nothing() -> None:
    assert in_a_line(ValueError("\nfirst\nsecond")) == "ValueError: first"
    assert in_a_line(KeyboardInterrupt()) == "KeyboardInterrupt: "
