"""Runs as processes of this machine, some at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from keeptune.board import Board
from keeptune.jobs import Job, run_job

STOPPED = 130
Work = Callable[[Job, Any], str | None]


@dataclass
class _Process:
    job: Job
    process: SpawnProcess
    pipe: Connection
    place: int
    said: list[str | None]

    @property
    def log(self) -> Path:
        return _log(self.job)


def run(
    jobs: Sequence[Job], board: Board, *, at_once: int = 1, work: Work = run_job
) -> Generator[tuple[Job, str | None], None, None]:
    """Run jobs in processes of their own, `at_once` at a time.

    Where there are several GPUs, each of the `at_once` places has one of them. What a process
    prints goes to a file beside its folder, which stays where the run failed. When
    this process ends, however it ends, so do they; what they saved is kept.

    Args:
        jobs: The runs.
        board: Is told how far they are.
        at_once: How many; they share the threads that one would have.
        work: What is called with each job, in its process.

    Yields:
        Each job when it ends, with None or with why it failed.

    Raises:
        KeyboardInterrupt: Ctrl-C; each run saved a state first, or a second one ended them.
    """
    waiting, places = list(jobs), list(range(at_once))
    running: dict[int, _Process] = {}
    gpus = _gpus() if at_once > 1 else []
    try:
        while waiting or running:
            while waiting and places:
                place = places.pop(0)
                gpu = gpus[place % len(gpus)] if len(gpus) > 1 else None
                one = _start(waiting.pop(0), place, (work, at_once, gpu))
                running[one.process.sentinel] = one
                board.started(one.job)
            ready = wait([*running, *(one.pipe for one in running.values())], timeout=0.5)
            for one in running.values():
                if one.pipe in ready:
                    _listen(one, board)
            for sentinel in [s for s in running if s in ready]:
                ended = running.pop(sentinel)
                places.append(ended.place)
                yield ended.job, _end(ended, board)
            board.tick()
    except KeyboardInterrupt:
        board.stopping()
        _stop(running.values())
        raise
    finally:
        for one in running.values():
            one.process.kill()


def _gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _start(job: Job, place: int, how: tuple[Work, int, str | None]) -> _Process:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_work, args=(job, theirs, *how), name=job.title)
    process.start()
    theirs.close()
    return _Process(job, process, ours, place, [])


def _listen(one: _Process, board: Board) -> None:
    """Take in everything that a process has told so far."""
    with contextlib.suppress(EOFError, OSError):
        while one.pipe.poll():
            what, values, figures = one.pipe.recv()
            if what == "end":
                one.said.append(values[0])
            else:
                board.told(one.job, what, *values, **figures)


def _end(one: _Process, board: Board) -> str | None:
    """Why a process that ended failed; None where its run is finished."""
    _listen(one, board)
    one.process.join()
    one.pipe.close()
    code = one.process.exitcode or 0
    if one.said:
        said = one.said[0]
    elif code == STOPPED:
        said = "stopped by a signal; a state was saved."
    elif code < 0:
        name = signal.Signals(-code).name
        memory = " Often that is a full memory: lower --jobs." if code == -signal.SIGKILL else ""
        said = f"its process was ended by {name}.{memory} What it printed is in {one.log}."
    else:
        said = f"its process ended with code {code}. What it printed is in {one.log}."
    if said is None:
        one.log.unlink(missing_ok=True)
    return said


def _stop(running: Iterable[_Process]) -> None:
    for one in running:
        one.process.terminate()
    for one in running:
        one.process.join()
        one.log.unlink(missing_ok=True)


# -- in the process of one run --------------------------------------------------------------------


def _work(job: Job, pipe: Connection, work: Work, at_once: int, gpu: str | None) -> None:
    # Ctrl-C in a terminal reaches the process that waits, and only through it this one.
    os.setpgrp()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _print_to(_log(job))
    _share_threads(at_once)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        said = work(job, Told(pipe))
    except KeyboardInterrupt:
        sys.exit(STOPPED)
    pipe.send(("end", (said,), {}))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _print_to(log: Path) -> None:
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def _log(job: Job) -> Path:
    return job.home / job.folder.with_name(f"{job.folder.name}.log")


def _share_threads(at_once: int) -> None:
    # torch reads it, as it does the GPUs, when it is imported, which is later.
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    threads = int(given) if given.isdecimal() else len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads // at_once))


class Told:
    """A run's `Progress` whose words go to the process that waits; too quick ones are dropped.

    Args:
        pipe: Leads there.
        every: Seconds between two reports of how far a phase is.
    """

    def __init__(self, pipe: Connection, every: float = 0.2) -> None:
        self._pipe, self._every = pipe, every
        self._last = 0.0

    def task(self, number: int, total: int, name: str) -> None:
        """Hands it on."""
        self._send("task", number, total, name)

    def phase(self, name: str, total: int, unit: str = "steps") -> None:
        """Hands it on."""
        self._send("phase", name, total, unit)

    def advance(self, done: int, **figures: float) -> None:
        """Hands it on, unless the last report is very recent."""
        if time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self._send("advance", done, **figures)

    def note(self, message: str) -> None:
        """Hands it on."""
        self._send("note", message)

    def warn(self, message: str) -> None:
        """Hands it on."""
        self._send("warn", message)

    def close(self) -> None:
        """Nothing is open."""

    def _send(self, what: str, *values: Any, **figures: float) -> None:
        # Without anybody who listens this process is about to end.
        with contextlib.suppress(OSError):
            self._pipe.send((what, values, figures))
