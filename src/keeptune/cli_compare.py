"""keeptune compare: many runs, one page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keeptune.cli_options import Overrides, RecipeFile
from keeptune.cli_stopping import FAILED, continued_by, stoppable_runs

if TYPE_CHECKING:
    from keeptune.compare import Compared


def compare(
    recipe: RecipeFile,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Strategies with commas between them: plain,replay+ewc,ewc(strength=10). A method "
            "has the settings that the recipe gives it, else its defaults; brackets change some. "
            "Default: plain, and the recipe's own strategy.",
        ),
    ] = None,
    seeds: Annotated[
        str,
        typer.Option(
            metavar="N", help="How many seeds, counted from the recipe's; or a list: 3,5,8."
        ),
    ] = "1",
    orders: Annotated[
        int,
        typer.Option(
            metavar="N", help="How many orders of the tasks: the recipe's, and others drawn."
        ),
    ] = 1,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Runs at the same time.")] = 1,
    engine: Annotated[
        str, typer.Option(help="Who does the runs: local (processes here), ray or slurm.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="For ray: the cluster's address; default: this machine.")
    ] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="For slurm: a parameter of submitit, such as slurm_partition=gpu, timeout_min=600 "
            "or gpus_per_node=1; cluster=local tries it out here. May be given many times.",
        ),
    ] = None,
    set_: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the run folders and the page; default: runs/NAME-compare."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and list the runs.")
    ] = False,
) -> None:
    """Run strategies with several seeds and orders of the tasks, and compare them on one page.

    Each run has a folder named by its content, so nothing is run twice: the same command goes on
    where it was stopped, and with more methods or seeds it runs only what is new. A run that fails
    does not stop the others. The exit code is 0 when all runs are finished, 1 when one failed, and
    2 when something is wrong before the first begins.
    """
    where = out or Path("runs") / f"{recipe.stem}-compare"
    again = ["compare", str(recipe), "--seeds", seeds, "--orders", str(orders)]
    again += ["--jobs", str(jobs), "--engine", engine, "--out", str(where)]
    again += ["--methods", methods] if methods is not None else []
    again += ["--address", address] if address is not None else []
    again += [word for one in slurm or () for word in ("--slurm", one)]
    again += [word for one in set_ or () for word in ("--set", one)]
    with stoppable_runs(continued_by(again)):
        from keeptune import board, engines
        from keeptune.recipe import load_recipe

        loaded = load_recipe(recipe, set_ or [])
        chosen = engines.choose(engine, at_once=jobs, address=address, slurm=slurm or [])
        typer.echo("loading libraries and data", err=True)
        from keeptune.compare import compare as run_all
        from keeptune.compare import plan

        planned = plan(loaded, where, methods=methods, seeds=seeds, orders=orders)
        if dry_run:
            for job in planned:
                state = "finished" if job.is_done else "to do"
                typer.echo(f"{state:9}{job.title}: {job.folder}")
            return
        done = run_all(planned, where, board.choose(sys.stderr), chosen)
    show_compared(done)


def show_compared(done: Compared) -> None:
    """The table of what is finished, then what failed, with the exit code of that."""
    from rich.console import Console

    from keeptune import comparison, terminal
    from keeptune.folder import RunFolder

    if done.page is not None:
        groups = comparison.compare([RunFolder(job.folder) for job in done.done])
        Console().print(terminal.comparison_table(groups))
        typer.echo(f"\nRun folders: {done.folder}\nReport:      {done.page}")
    for job, said in done.failed:
        typer.echo(f"keeptune: {job.title} failed: {said}", err=True)
    if done.failed:
        typer.echo(
            f"keeptune: {len(done.failed)} of {len(done.failed) + len(done.done)} runs failed. "
            "The same command tries them again, and only them.",
            err=True,
        )
        raise typer.Exit(FAILED)
