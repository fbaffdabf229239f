"""How long commands end when they are stopped, and what their exit codes mean."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer

FAILED, STOPPED = 1, 130


def continued_by(words: Sequence[str]) -> str:
    """The command that goes on, in words."""
    return f"Continue with: keeptune {shlex.join(words)}"


@contextmanager
def stoppable(how: str) -> Iterator[None]:
    """Ctrl-C ends a command, and says how it goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        typer.echo(f"keeptune: stopped. {how}", err=True)
        raise typer.Exit(STOPPED) from error


@contextmanager
def stoppable_runs(how: str) -> Iterator[None]:
    """As `stoppable`; SIGTERM is the same as Ctrl-C, so that each run saves a state."""
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with stoppable(how):
            yield
    finally:
        signal.signal(signal.SIGTERM, former)
