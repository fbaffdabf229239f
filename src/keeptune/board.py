"""What a comparison shows while many runs work: one line or one bar each, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sized
from typing import IO, Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.table import Column

from keeptune.jobs import Job
from keeptune.progress import duration, print_note, print_warning, screen


class _Run:
    """How far one run is: a share of 1, in tasks of the stream, and the words for it."""

    def __init__(self, share: float, now: float) -> None:
        self.share = self.first = share
        self.began = now
        self.words = "loading"
        self._phase, self._total, self._unit = "", 0, ""
        self._task, self._tasks = 0, 1

    def task(self, number: int, total: int, name: str) -> None:
        self._task, self._tasks = number, total
        self.share = max(self.share, (number - 1) / total)

    def phase(self, name: str, total: int, unit: str = "steps") -> None:
        if name != self._phase:
            self.words = name
        self._phase, self._total, self._unit = name, total, unit

    def advance(self, done: int, **figures: float) -> None:
        of = f" of {self._total:,}" if self._total else ""
        self.words = f"{self._phase}, {done:,}{of} {self._unit}"
        if self._phase.startswith("train") and self._total:
            part = min(done / self._total, 1.0)
            self.share = max(self.share, (self._task - 1 + part) / self._tasks)

    def close(self) -> None:
        """A run's own progress ends; the run itself may go on."""


class Board:
    """Plain lines, for logs and pipes: one for each end, and one every so many seconds.

    Args:
        stream: Where the lines go.
        every: Seconds between two lines that say how far all are.
        clock: Seconds that only ever grow.
    """

    def __init__(
        self, stream: IO[str], *, every: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream, self._every, self._clock = stream, every, clock
        self._began = self._said = clock()
        self._all = self._waiting = 0
        self._progressed = 0.0
        self._running: dict[Job, _Run] = {}
        self._warned: set[str] = set()

    def begin(self, todo: Sized, finished: int) -> None:
        """Say how many runs there are.

        Args:
            todo: Those to be run.
            finished: How many are finished already.
        """
        self._began = self._said = self._clock()
        self._all, self._waiting = len(todo) + finished, len(todo)
        before = f", {finished} finished before" if finished else ""
        self.note(f"{_runs(self._all)}{before}")

    def started(self, job: Job) -> None:
        """A run begins."""
        self._waiting -= 1
        self._running[job] = _Run(job.share, self._clock())

    def told(self, job: Job, what: str, *values: Any, **figures: float) -> None:
        """Hand on what a run told its own `Progress`; `what` is the verb's name."""
        if what == "warn":
            self._warn(str(values[0]))
        elif what != "note":
            getattr(self._running[job], what)(*values, **figures)

    def looked(self, job: Job) -> None:
        """Look into the folder of a run that cannot tell how far it is."""
        run = self._running[job]
        run.share = max(run.share, job.share)
        run.words = f"{round(run.share * 100)} % of its tasks"

    def ended(self, job: Job, said: str | None) -> None:
        """A run is finished, or failed with a sentence."""
        run = self._running.pop(job)
        self._progressed += 1 - run.first
        took = duration(self._clock() - run.began)
        if said is None:
            self.note(f"{job.title}: finished in {took}")
        else:
            self._warn(f"{job.title}: failed: {said}")

    def tick(self) -> None:
        """Show how far all are, when that was last shown long enough ago."""
        now = self._clock()
        if now - self._said >= self._every:
            self._said = now
            parts = [self.so_far(), *(f"{j.title}: {r.words}" for j, r in self._running.items())]
            self.note("; ".join(parts))

    def so_far(self) -> str:
        """`2 of 6 runs, 12 min 5 s left`."""
        done = self._all - self._waiting - len(self._running)
        text = f"{done} of {_runs(self._all)}"
        running = self._running.values()
        progressed = self._progressed + sum(run.share - run.first for run in running)
        if progressed <= 0:
            return text
        todo = self._waiting + sum(1 - run.share for run in running)
        return f"{text}, {duration((self._clock() - self._began) / progressed * todo)} left"

    def note(self, message: str) -> None:
        """One plain line."""
        self._stream.write(message + "\n")
        self._stream.flush()

    def stopping(self) -> None:
        """Ctrl-C reached the runs."""
        self.note("stopping: each run saves a state after its step (again to stop at once)")

    def close(self) -> None:
        """Nothing more comes."""

    def _warn(self, message: str) -> None:
        # Runs of one comparison share their data, and so what there is to warn of.
        if message not in self._warned:
            self._warned.add(message)
            self.warn(message)

    def warn(self, message: str) -> None:
        """One line that should not be overlooked."""
        self.note(f"warning: {message}")


class BarBoard(Board):
    """A bar for all runs and one for each that is at work, on a terminal.

    Args:
        console: The terminal.
        clock: Seconds that only ever grow.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console.file, every=0.5, clock=clock)
        one_line = Column(no_wrap=True, overflow="ellipsis")
        self._bars = rich.progress.Progress(
            TextColumn("{task.description}", markup=False, table_column=one_line),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[words]}", markup=False, table_column=one_line),
            console=console,
            transient=True,
        )
        self._whole: TaskID | None = None
        self._bar: dict[Job, TaskID] = {}

    def begin(self, todo: Sized, finished: int) -> None:
        """Draw the bar of all runs."""
        super().begin(todo, finished)
        self._bars.start()
        self._whole = self._bars.add_task("all runs", total=len(todo), words="")

    def started(self, job: Job) -> None:
        """Draw its bar."""
        super().started(job)
        self._bar[job] = self._bars.add_task(job.title, total=1.0, words="loading")

    def ended(self, job: Job, said: str | None) -> None:
        """Take its bar away; one line is left."""
        self._bars.remove_task(self._bar.pop(job))
        super().ended(job, said)

    def tick(self) -> None:
        """Move the bars."""
        for job, bar in self._bar.items():
            run = self._running[job]
            self._bars.update(bar, completed=run.share, words=run.words)
        if self._whole is not None:
            shares = self._progressed + sum(r.share - r.first for r in self._running.values())
            self._bars.update(self._whole, completed=shares, words=self.so_far())

    def note(self, message: str) -> None:
        """One line above the bars."""
        print_note(self._bars.console, message)

    def warn(self, message: str) -> None:
        """One yellow line above the bars."""
        print_warning(self._bars.console, message)

    def close(self) -> None:
        """Take the bars away."""
        self._bars.stop()


def choose(stream: IO[str]) -> Board:
    """Bars where the stream is a terminal that can move its cursor, else plain lines."""
    console = screen(stream)
    return BarBoard(console) if console is not None else Board(stream)


def _runs(number: int) -> str:
    return f"{number} run{'s' * (number != 1)}"
