"""keeptune noise: how much a run's numbers vary by chance."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keeptune.cli_stopping import FAILED, continued_by, stoppable_runs

if TYPE_CHECKING:
    from keeptune.noise import Measured


def noise(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    seeds: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=100,
            help="Under how many other seeds to run its recipe; 0: none.",
        ),
    ] = 3,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Runs at the same time.")] = 1,
) -> None:
    """Measure the smallest difference that means something for a run's tasks and guards.

    The run's weights are scored again in other batches, and its recipe is run again under other
    seeds, which takes as long as so many runs. From then on reports call a change or a difference
    that is smaller than what comes about by chance "within the noise". Nothing is run twice: the
    same command goes on where it was stopped. The exit code is 1 when one of the runs failed.
    """
    again = ["noise", str(folder), "--seeds", str(seeds), "--jobs", str(jobs)]
    with stoppable_runs(continued_by(again)):
        from keeptune import board, engines
        from keeptune.progress import choose

        progress = choose(sys.stderr)
        progress.note("loading libraries, model and data")
        from keeptune.noise import measure

        try:
            engine = engines.choose("local", at_once=jobs)
            shown = board.choose(sys.stderr)
            done = measure(folder, seeds, board=shown, engine=engine, progress=progress)
        finally:
            progress.close()
    _show(done)


def _show(done: Measured) -> None:
    from rich.console import Console

    from keeptune import terminal
    from keeptune.report import write

    Console().print(terminal.noise_table(done.noise))
    page = write([done.folder.path])
    typer.echo(f"\nKept in:    {done.folder.path / 'noise.json'}")
    if len(done.noise.seeds) > 1:
        typer.echo(f"Other runs: {done.seeds_in}")
    typer.echo(f"Report:     {page}")
    for job, said in done.failed:
        typer.echo(f"keeptune: {job.title} failed: {said}", err=True)
    if done.failed:
        raise typer.Exit(FAILED)
