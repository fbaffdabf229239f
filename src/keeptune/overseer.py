"""Who is asked while a task is trained, and may end it or set its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from keeptune.method import Context


class Overseer(Protocol):
    """Asked at both ends of a task's training and after each step.

    It may score the model, and set its weights when a task ends. It leaves the model's mode and the
    global random numbers as found.
    """

    @property
    def ended(self) -> bool:
        """Whether the task has been ended, so that no step is taken any more."""

    def begin(self, ctx: Context) -> None:
        """After every method's `begin_task`."""

    def start(self, step: int, steps: int) -> None:
        """Training begins, or goes on after a step."""

    def after_step(self, ctx: Context, step: int, steps: int) -> dict[str, float]:
        """After each optimizer step; returns what trackers are told, or nothing."""

    def end(self, ctx: Context) -> None:
        """After the last step, before any method's `end_task`."""

    def write(self, folder: Path | None) -> None:
        """Keep what a resumed run needs; None in a process that only helps."""

    def read(self, folder: Path) -> None:
        """Take back what `write` kept, after `begin`."""
