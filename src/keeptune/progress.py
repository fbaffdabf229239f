"""What a run shows while it works: bars on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from copy import copy
from typing import IO, Protocol, TextIO

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text


class Progress(Protocol):
    """How a run tells what it does. Every call is cheap; none changes the run."""

    def task(self, number: int, total: int, name: str) -> None:
        """A task of the stream begins: number 1 to `total`."""

    def phase(self, name: str, total: int, unit: str = "steps") -> None:
        """A phase of `total` units begins and the former one ends; 0: length not known yet.

        The name of the present phase again only sets its length.
        """

    def advance(self, done: int, **figures: float) -> None:
        """So many units of the phase are done in all.

        Of the figures `loss`, `..._per_second`, `..._share` and `..._perplexity` are shown.
        """

    def note(self, message: str) -> None:
        """One plain line."""

    def warn(self, message: str) -> None:
        """One line that should not be overlooked."""

    def close(self) -> None:
        """Ends the phase; may be called twice."""


class Silent:
    """Shows nothing: for notebooks' quiet runs and for tests."""

    def task(self, number: int, total: int, name: str) -> None:
        """Shows nothing."""

    def phase(self, name: str, total: int, unit: str = "steps") -> None:
        """Shows nothing."""

    def advance(self, done: int, **figures: float) -> None:
        """Shows nothing."""

    def note(self, message: str) -> None:
        """Shows nothing."""

    def warn(self, message: str) -> None:
        """Shows nothing."""

    def close(self) -> None:
        """Shows nothing."""


class _Phase:
    """What is known about the phase that runs now; all times in seconds."""

    def __init__(self, name: str, total: int, unit: str, now: float) -> None:
        self.name, self.total, self.unit, self.began = name, total, unit, now
        self.done = 0
        self.figures: dict[str, float] = {}
        self._first: tuple[int, float] | None = None

    def advance(self, done: int, figures: dict[str, float], now: float) -> None:
        self.done = done
        self.figures.update(figures)
        # A resumed phase begins in the middle: its speed counts from the first word on.
        self._first = self._first or (done, now)

    def so_far(self, now: float) -> str:
        """One line: how far, the figures, the time left."""
        left = ""
        if self._first is not None and self.total and self.done > self._first[0]:
            each = (now - self._first[1]) / (self.done - self._first[0])
            left = f"{duration(each * max(self.total - self.done, 0))} left"
        return self._line(left)

    def ended(self, now: float) -> str:
        """One line: how far it came, the last figures, what it took."""
        return self._line(f"{duration(now - self.began)} in all")

    def _line(self, clock: str) -> str:
        count = f"{self.done:,} of {self.total:,}" if self.total else f"{self.done:,}"
        parts = [f"{count} {self.unit}", figures_text(self.figures), clock]
        return f"{self.name}: {', '.join(part for part in parts if part)}"


class Lines:
    """Plain lines, for logs and pipes: at most one per `every` seconds, and one per phase end.

    Args:
        stream: Where the lines go.
        every: Seconds between two lines of one phase.
        clock: Seconds that only ever grow.
    """

    def __init__(
        self, stream: TextIO, *, every: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream, self._every, self._clock = stream, every, clock
        self._phase: _Phase | None = None
        self._said = 0.0

    def task(self, number: int, total: int, name: str) -> None:
        """Ends the phase and says which task begins."""
        self.close()
        self._say(f"task {number} of {total}: {name}")

    def phase(self, name: str, total: int, unit: str = "steps") -> None:
        """Ends the former phase; says nothing until there is something to say."""
        if self._phase is not None and self._phase.name == name:
            self._phase.total, self._phase.unit = total, unit
            return
        self.close()
        self._said = self._clock()
        self._phase = _Phase(name, total, unit, self._said)

    def advance(self, done: int, **figures: float) -> None:
        """Says how far the phase is, when the last line is old enough."""
        if self._phase is None:
            return
        now = self._clock()
        self._phase.advance(done, figures, now)
        if now - self._said >= self._every:
            self._said = now
            self._say(self._phase.so_far(now))

    def note(self, message: str) -> None:
        """One plain line."""
        self._say(message)

    def warn(self, message: str) -> None:
        """One line that starts with "warning"."""
        self._say(f"warning: {message}")

    def close(self) -> None:
        """Says how the phase ended."""
        if self._phase is not None:
            self._say(self._phase.ended(self._clock()))
        self._phase = None

    def _say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class Bars:
    """Two bars on a terminal: tasks of the stream, and the phase with loss, speed and time left.

    Args:
        console: The terminal.
    """

    def __init__(self, console: Console) -> None:
        one_line = Column(no_wrap=True, overflow="ellipsis")
        self._bars = rich.progress.Progress(
            TextColumn("{task.description}", markup=False, table_column=one_line),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}", markup=False),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}", markup=False, table_column=copy(one_line)),
            console=console,
            transient=True,
        )
        self._stream_bar: TaskID | None = None
        self._phase_bar: TaskID | None = None
        self._phase: _Phase | None = None

    def task(self, number: int, total: int, name: str) -> None:
        """Moves the upper bar."""
        self._end_phase()
        self._bars.start()
        if self._stream_bar is None:
            self._stream_bar = self._bars.add_task("", unit="tasks", figures="")
        text = f"task {number} of {total}: {name}"
        self._bars.update(self._stream_bar, description=text, completed=number - 1, total=total)

    def phase(self, name: str, total: int, unit: str = "steps") -> None:
        """Starts a new lower bar; the former phase leaves one line above the bars."""
        if self._phase is not None and self._phase_bar is not None and self._phase.name == name:
            self._phase.total, self._phase.unit = total, unit
            self._bars.update(self._phase_bar, total=total or None, unit=unit)
            return
        self._end_phase()
        self._bars.start()
        self._phase = _Phase(name, total, unit, time.monotonic())
        self._phase_bar = self._bars.add_task(name, total=total or None, unit=unit, figures="")

    def advance(self, done: int, **figures: float) -> None:
        """Moves the lower bar."""
        if self._phase is None or self._phase_bar is None:
            return
        self._phase.advance(done, figures, time.monotonic())
        text = figures_text(self._phase.figures)
        self._bars.update(self._phase_bar, completed=done, figures=text)

    def note(self, message: str) -> None:
        """One line above the bars."""
        print_note(self._bars.console, message)

    def warn(self, message: str) -> None:
        """One yellow line above the bars."""
        print_warning(self._bars.console, message)

    def close(self) -> None:
        """Takes the bars away."""
        self._end_phase()
        self._bars.stop()

    def _end_phase(self) -> None:
        if self._phase is not None and self._phase_bar is not None:
            self._bars.remove_task(self._phase_bar)
            self.note(self._phase.ended(time.monotonic()))
        self._phase = self._phase_bar = None


def print_note(console: Console, message: str) -> None:
    """One line as it is."""
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def print_warning(console: Console, message: str) -> None:
    """One yellow line."""
    console.print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)


def screen(stream: IO[str]) -> Console | None:
    """The terminal behind a stream; None where it is none that can move its cursor."""
    console = Console(file=stream)
    return console if console.is_terminal and not console.is_dumb_terminal else None


def choose(stream: TextIO) -> Progress:
    """Bars where the stream is a terminal that can move its cursor, else plain lines."""
    console = screen(stream)
    return Bars(console) if console is not None else Lines(stream)


def figures_text(figures: dict[str, float]) -> str:
    """`loss 0.41, 5,120 tokens/s, facts 62 %`: the loss, the speeds and the scores seen."""
    texts = []
    for name, value in figures.items():
        large = math.isfinite(value) and abs(value) >= 1000
        shown = f"{value:,.0f}" if large else f"{value:.4g}"
        if name == "loss":
            texts.append(f"loss {shown}")
        elif name.endswith("_share"):
            texts.append(f"{name.removesuffix('_share')} {100 * value:.0f} %")
        elif name.endswith("_perplexity"):
            texts.append(f"{name.removesuffix('_perplexity')} {shown}")
        elif name.endswith("_per_second"):
            texts.append(f"{shown} {name.removesuffix('_per_second')}/s")
    return ", ".join(texts)


def duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
