"""Runs as processes: some at a time, each with its end, and none left behind."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine_work import job, marks, work
from keeptune.board import Board
from keeptune.engines import choose, local
from keeptune.errors import RecipeError
from keeptune.jobs import Job


def run(jobs: list[Job], at_once: int = 1) -> tuple[dict[str, str | None], str]:
    shown = io.StringIO()
    board = Board(shown, every=0)
    board.begin(jobs, 0)
    ends = {}
    for one, said in local.run(jobs, board, at_once=at_once, work=work):
        board.ended(one, said)
        ends[one.folder.name] = said
    return ends, shown.getvalue()


def test_each_way_to_end_is_told_and_stops_no_other(tmp_path: Path) -> None:
    ways = ("", "fail", "die", "break", "stop")
    jobs = [job(tmp_path, f"job-{does}", does=does) for does in ways]
    ends, shown = run(jobs, at_once=2)
    assert ends["job-"] is None
    assert ends["job-fail"] == "the loss is not a number"
    assert ends["job-die"] is not None
    assert ends["job-die"].startswith("its process was ended by SIGKILL. Often that is a full mem")
    assert ends["job-break"] == (
        f"its process ended with code 1. What it printed is in {tmp_path}/job-break.log."
    )
    assert ends["job-stop"] == "stopped by a signal; a state was saved."
    assert "RuntimeError: a bug" in (tmp_path / "job-break.log").read_text()
    assert not (tmp_path / "job-.log").exists()
    assert "job-, seed 0: finished in" in shown
    assert "warning: job-fail, seed 0: failed: the loss is not a number" in shown
    assert shown.count("warning: b has few rows") == 1
    assert "train b, 3 of 4 steps" in shown


def test_ctrl_c_ends_the_runs_that_are_at_work(tmp_path: Path) -> None:
    jobs = [job(tmp_path, name, seconds=60) for name in ("a", "b", "c")]

    class Impatient(Board):
        def tick(self) -> None:
            if all((tmp_path / f"{name}.began").exists() for name in "ab"):
                raise KeyboardInterrupt

    board = Impatient(io.StringIO())
    board.begin(jobs, 0)
    with pytest.raises(KeyboardInterrupt):
        list(local.run(jobs, board, at_once=2, work=work))
    assert not (tmp_path / "c.began").exists()
    for name in "ab":
        with pytest.raises(ProcessLookupError):
            os.kill(int(marks(tmp_path, "began")[name][0]), 0)


def test_threads_and_gpus_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    run([job(tmp_path, name) for name in ("a", "b")], at_once=2)
    assert [found[1:] for found in marks(tmp_path, "finished").values()] == [["2", "3"], ["2", "7"]]
    run([job(tmp_path, "c")])
    assert marks(tmp_path, "finished")["c"][1:] == ["5", "3,7"]


def test_no_process_outlives_the_one_that_waits(tmp_path: Path) -> None:
    code = (
        "import io, pathlib, engine_work\n"
        "from keeptune.board import Board\nfrom keeptune.engines import local\n"
        "if __name__ == '__main__':\n"
        f"    jobs = [engine_work.job(pathlib.Path({str(tmp_path)!r}), 'a', seconds=60)]\n"
        "    board = Board(io.StringIO())\n    board.begin(jobs, 0)\n"
        "    list(local.run(jobs, board, work=engine_work.work))\n"
    )
    (tmp_path / "main.py").write_text(code)
    path = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    waits = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py")], env={**os.environ, "PYTHONPATH": path}
    )
    began = tmp_path / "a.began"
    until(began.exists)
    waits.send_signal(signal.SIGKILL)
    waits.wait()
    pid = int(marks(tmp_path, "began")["a"][0])
    until(lambda: not Path(f"/proc/{pid}").exists() or "State:\tZ" in status(pid))


def status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""


def until(true: object, seconds: float = 60) -> None:
    assert callable(true)
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_engine_that_is_not_there_is_named() -> None:
    with pytest.raises(
        RecipeError, match=r"--engine rya: there is no such engine. Did you mean 'r"
    ):
        choose("rya", at_once=1)
    with pytest.raises(RecipeError, match="--address is for --engine ray, but the engine is local"):
        choose("local", at_once=1, address="auto")
