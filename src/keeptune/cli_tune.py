"""keeptune tune: settings searched for on held-out training rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keeptune.cli_options import Overrides, RecipeFile
from keeptune.cli_stopping import continued_by, stoppable_runs

if TYPE_CHECKING:
    from keeptune.tune import Tuned


def tune(
    recipe: RecipeFile,
    trials: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many settings are tried, all together.")
    ] = 20,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=LOW..HIGH",
            help="What is searched: methods.0.ewc.strength=1e2..1e6:log, where :log counts each "
            "doubling alike; or default, the usual settings of the recipe's methods; may be given "
            "many times. Default: default.",
        ),
    ] = None,
    validation: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0.01,
            max=0.9,
            help="Share of the training rows that is held out to score trials on; default: the "
            "recipe's, or 0.2.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Trials at the same time.")] = 1,
    set_: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the trials; default: runs/NAME-tune.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and list what is searched.")
    ] = False,
) -> None:
    """Search the settings of a recipe's methods for the best bargains between learning and keeping.

    Trials are trained without a share of the training rows and scored on these; the tasks' own
    evaluation rows are not looked at. Shown are the trials that no other beats in both, and the
    recipe at the knee between them is written, ready to run. Nothing is run twice: the same command
    goes on where it was stopped, and with more trials it adds to them. Needs Optuna (extra `tune`).
    """
    where = out or Path("runs") / f"{recipe.stem}-tune"
    again = ["tune", str(recipe), "--trials", str(trials), "--jobs", str(jobs)]
    again += ["--out", str(where)]
    again += ["--validation", str(validation)] if validation is not None else []
    again += [word for one in search or () for word in ("--search", one)]
    again += [word for one in set_ or () for word in ("--set", one)]
    with stoppable_runs(continued_by(again)):
        typer.echo("loading libraries and data", err=True)
        from keeptune import board, engines
        from keeptune.tune import plan
        from keeptune.tune import tune as search_for

        planned = plan(recipe, set_ or [], search=search or [], share=validation)
        if dry_run:
            for one in planned.ranges:
                typer.echo(one)
            return
        engine = engines.choose("local", at_once=jobs)
        done = search_for(planned, trials, where, board.choose(sys.stderr), engine, jobs)
    _show(done)


def _show(done: Tuned) -> None:
    from rich.console import Console

    from keeptune import terminal

    Console().print(terminal.tuned_table(done.trials))
    typer.echo(f"\nReport of these: {done.page}\nRecipe at the knee: {done.recipe}")
    for trial in done.trials:
        if trial.said:
            typer.echo(f"keeptune: trial {trial.number} failed: {trial.said}", err=True)
