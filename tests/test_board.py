"""What people see while many runs work."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

import runs
from engine_work import job
from keeptune.board import BarBoard, Board, choose
from keeptune.jobs import Job
from test_progress import Clock


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    return [job(tmp_path, name) for name in ("a", "b", "c")]


def test_lines_say_how_far_all_are_and_the_time_left(jobs: list[Job]) -> None:
    shown, clock = io.StringIO(), Clock()
    board = Board(shown, every=30, clock=clock)
    board.begin(jobs, 1)
    board.started(jobs[0])
    board.started(jobs[1])
    board.tick()
    for one in jobs[:2]:
        board.told(one, "task", 1, 2, "x")
        board.told(one, "phase", "evaluate before training", 7, "examples")
        board.told(one, "advance", 7)
        board.told(one, "phase", "train x", 100)
    clock.now += 30
    board.told(jobs[0], "advance", 50, loss=0.4)
    board.told(jobs[0], "note", "going on at step 3")
    board.told(jobs[1], "warn", "few rows")
    board.told(jobs[0], "warn", "few rows")
    board.tick()
    clock.now += 30
    board.ended(jobs[0], None)
    board.ended(jobs[1], "memory is full")
    board.tick()
    assert shown.getvalue().splitlines() == [
        "4 runs, 1 finished before",
        "warning: few rows",
        # A quarter of one of three in 30 s.
        "1 of 4 runs, 5 min 30 s left; a, seed 0: train x, 50 of 100 steps; b, seed 0: train x",
        "a, seed 0: finished in 1 min 0 s",
        "warning: b, seed 0: failed: memory is full",
        "3 of 4 runs, 30 s left",
    ]


def test_a_run_that_goes_on_counts_for_what_is_left_of_it(jobs: list[Job], tmp_path: Path) -> None:
    clock = Clock()
    board = Board(io.StringIO(), clock=clock)
    runs.fabricate(jobs[0].folder, runs.info(["a", "b"]), R=runs.stream(["a", "b"], 0.5, 0)[:2])
    board.begin(jobs[:1], 0)
    board.started(jobs[0])
    assert board.so_far() == "0 of 1 run"
    clock.now += 10
    board.told(jobs[0], "task", 2, 2, "b")
    board.told(jobs[0], "phase", "train b", 4)
    board.told(jobs[0], "advance", 1)
    assert board.so_far() == "0 of 1 run, 30 s left"
    board.looked(jobs[0])
    assert board.so_far() == "0 of 1 run, 30 s left"


def test_bars_on_a_terminal_leave_one_line_a_run(jobs: list[Job]) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100, color_system=None)
    board = BarBoard(console)
    board.begin(jobs, 0)
    board.started(jobs[0])
    board.told(jobs[0], "task", 1, 1, "x")
    board.told(jobs[0], "phase", "train x", 4)
    board.told(jobs[0], "advance", 2)
    board.tick()
    board.ended(jobs[0], "[bold]no[/]")
    board.close()
    text = shown.getvalue()
    assert "3 runs" in text
    assert "warning: a, seed 0: failed: [bold]no[/]" in text


def test_bars_only_where_the_cursor_can_move(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(choose(io.StringIO())) is Board
