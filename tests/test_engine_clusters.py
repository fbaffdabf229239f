"""Ray and Slurm: the same function in processes that others start."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import engine_work
from engine_work import job, marks
from keeptune.board import Board
from keeptune.engines import choose, ray, slurm
from keeptune.errors import RecipeError
from keeptune.jobs import Job


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    for module in (ray, slurm):
        monkeypatch.setattr(module, "run_job", engine_work.work)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # it would write a token into the home folder
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    return [job(tmp_path, f"job-{does}", does=does) for does in ("", "fail", "die")]


def ends(run: Callable[..., Iterator[tuple[Job, str | None]]], jobs: list[Job]) -> dict[str, str]:
    board = Board(io.StringIO())
    board.begin(jobs, 0)
    said = {}
    for one, failure in run(jobs, board):
        board.ended(one, failure)
        said[one.folder.name] = failure or ""
    return said


def test_ray_runs_jobs_and_tells_their_ends(jobs: list[Job], tmp_path: Path) -> None:
    said = ends(choose("ray", at_once=2), jobs)
    assert said["job-"] == ""
    assert said["job-fail"] == "the loss is not a number"
    assert said["job-die"].startswith("WorkerCrashedError: ")
    assert set(marks(tmp_path, "finished")) == {"job-"}
    assert len({found[0] for found in marks(tmp_path, "began").values()}) == 3


def test_slurm_runs_jobs_and_tells_their_ends(jobs: list[Job], tmp_path: Path) -> None:
    said = ends(choose("slurm", at_once=2, slurm=["cluster=local", "timeout_min=5"]), jobs)
    assert said["job-"] == ""
    assert said["job-fail"] == "the loss is not a number"
    assert said["job-die"]
    assert set(marks(tmp_path, "finished")) == {"job-"}
    assert list((tmp_path / ".slurm").glob("*_log.out"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--engine slurm: submitit says: "),
        (["cluster=local", "minutes=3"], "minutes"),
        (["timeout_min"], "--slurm timeout_min: write key=value, such as timeout_min=600"),
    ],
)
def test_what_slurm_cannot_do_is_a_sentence(jobs: list[Job], words: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        ends(choose("slurm", at_once=1, slurm=words), jobs)


@pytest.mark.parametrize("name", ["ray", "submitit"])
def test_what_is_not_installed_is_named(
    jobs: list[Job], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    engine = choose("ray" if name == "ray" else "slurm", at_once=1)
    with pytest.raises(RecipeError, match=r"pip install -c constraints\.txt"):
        ends(engine, jobs)


@pytest.mark.parametrize(
    ("nodes", "at_once", "share"),
    [
        ([{"CPU": 64}, {"CPU": 8, "GPU": 1}], 1, {"num_cpus": 8, "num_gpus": 1}),
        ([{"CPU": 64}, {"CPU": 8, "GPU": 2}], 2, {"num_cpus": 4, "num_gpus": 1}),
        ([{"CPU": 4}, {"CPU": 8}], 2, {"num_cpus": 6, "num_gpus": 0}),
        ([{"CPU": 2}], 8, {"num_cpus": 1, "num_gpus": 0}),
    ],
)
def test_a_run_asks_for_no_more_than_some_machine_with_a_gpu_has(
    nodes: list[dict[str, int]], at_once: int, share: dict[str, int]
) -> None:
    cluster = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": n} for n in nodes])
    assert ray._share(cluster, at_once) == share
