"""The command line: keeptune demo | run | learn | compare | repair | forget | export | report | ...

Commands import what they need when they run, so that `keeptune --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keeptune.cli_advise import advise
from keeptune.cli_compare import compare
from keeptune.cli_noise import noise
from keeptune.cli_options import Overrides, RecipeFile
from keeptune.cli_repair import repair
from keeptune.cli_stopping import continued_by, stoppable
from keeptune.cli_tune import tune
from keeptune.errors import KeeptuneError

if TYPE_CHECKING:
    from keeptune.folder import RunFolder
    from keeptune.progress import Progress
    from keeptune.recipe import Recipe

app = typer.Typer(
    help="Fine-tune language models on one task after another, keep what they knew, and prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SPREAD = ("run", "learn")  # commands that several processes can share

Seed = Annotated[
    int | None, typer.Option(min=0, max=2**32 - 1, help="The same as --set seed=NUMBER.")
]
RunOut = Annotated[
    Path | None,
    typer.Option(help="The run folder; default: the recipe's `out`, or runs/ and its file name."),
]


def main() -> int:
    """Entry point: the commands, with every error a user can cause as one plain sentence.

    Returns:
        The exit code when a command did not end by itself: 2 for a user's error, 1 for a pipe
        that was closed.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app(prog_name="keeptune")
        finally:
            sys.stdout.flush()
    except KeeptuneError as error:
        if os.environ.get("RANK", "0") != "0":
            # What the first process says too need not be said again: its end ends this one.
            time.sleep(5)
        _complain(str(error))
        return 2
    except BrokenPipeError:
        # What is still buffered must have somewhere to go when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        _complain(f"{error.filename} cannot be read or written: {error.strerror}.")
        return 2
    return 0


@app.callback()
def _before_any_command(ctx: typer.Context) -> None:
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1" and ctx.invoked_subcommand not in SPREAD:
        raise KeeptuneError(
            f"`keeptune {ctx.invoked_subcommand}` is one process, but was started as {count}. "
            "Start it without torchrun or accelerate launch; "
            f"several processes can {' and '.join(SPREAD)}."
        )
    # TRL reports its use to a server unless told not to.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Threads that spin long while they wait make a shared machine many times slower; those that
    # do not spin at all, a quiet one.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where its run folders and report go.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Teach a real small model a few tasks, plainly and with protection, and compare."""
    with _working(["demo", "--out", str(out)]) as progress:
        from keeptune.demo import run_demo

        page = run_demo(out, progress)
    typer.echo(f"Report: {page}")


@app.command()
def run(
    recipe: RecipeFile,
    set_: Overrides = None,
    out: RunOut = None,
    seed: Seed = None,
    online: Annotated[
        bool, typer.Option("--online", help="The same as --set online=true: rows come once.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that stopped.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, train and write nothing.")
    ] = False,
) -> None:
    """Train what a recipe says, and report what was learned and what was forgotten."""
    changes = list(set_ or [])
    if seed is not None:
        changes.append(f"seed={seed}")
    if online:
        changes.append("online=true")
    loaded = _load(recipe, changes, out)
    if dry_run:
        _inspect(loaded)
        return
    again = ["run", str(recipe), "--resume", "--out", str(loaded.out)]
    again += [word for change in changes for word in ("--set", change)]
    with _working(again) as progress:
        from keeptune.runs import run as run_recipe

        folder = run_recipe(loaded, resume=resume, progress=progress)
    _show(folder)


@app.command()
def learn(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="Training rows of the new task.")],
    name: Annotated[str, typer.Option(help="What to call the new task.")],
    evaluation: Annotated[
        str | None, typer.Option("--eval", help="Evaluation rows; default: recall of DATA.")
    ] = None,
    score: Annotated[str | None, typer.Option(help="Score; default: by the rows' shape.")] = None,
) -> None:
    """Teach the model of a finished run one more task, with the same methods.

    When it was stopped, the same command again continues it.
    """
    again = ["learn", str(folder), data, "--name", name]
    again += ["--eval", evaluation] if evaluation is not None else []
    again += ["--score", score] if score is not None else []
    with _working(again) as progress:
        from keeptune.runs import learn as learn_task

        done = learn_task(folder, data, name=name, eval=evaluation, score=score, progress=progress)
    _show(done)


@app.command()
def forget(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Which examples: task=NAME, text=WORDS (case does not matter), regex=PATTERN "
            "(of Python) or rows=FILE (a data file); may be given many times, and all must hold.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count, remove nothing.")] = False,
) -> None:
    """Remove examples from every buffer and every result of a run, as when a person asks.

    When it was stopped, the same command again does the rest.
    """
    from keeptune.forgetting import forget as forget_examples
    from keeptune.terminal import forgotten_text

    done = forget_examples(folder, where or [], dry_run=dry_run)
    typer.echo(forgotten_text(done, dry_run=dry_run))


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the model.")],
    task: Annotated[
        str | None, typer.Option(help="The task to answer; default: a model not told the task.")
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Write the whole model, its adapter merged in.")
    ] = False,
) -> None:
    """Write a run's model, or its adapter, as transformers, PEFT and vLLM load it."""
    again = ["export", str(folder), str(out)]
    again += ["--task", task] if task is not None else []
    with _working([*again, "--merged"] if merged else again):
        from keeptune.export import export as export_model

        done = export_model(folder, out, task=task, merged=merged)
    how = " (its adapter merged in)" if done.is_merged else ""
    typer.echo(
        f"Export: {done.path}, a whole model{how}"
        if done.kind == "model"
        else f"Export: {done.path}, a PEFT adapter"
    )


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page; default: report.html in the run, comparison.html beside several."
        ),
    ] = None,
) -> None:
    """Make one HTML page of one run, or of several to compare them."""
    from keeptune.report import write

    typer.echo(f"Report: {write(folders, out)}")


app.command()(advise)
app.command()(compare)
app.command()(noise)
app.command()(repair)
app.command()(tune)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show its card.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """List the methods that keep old knowledge, or show the card and settings of one."""
    from rich.console import Console

    from keeptune import registry, terminal

    classes = [registry.get(one) for one in ([name] if name else registry.names())]
    if markdown:
        typer.echo(terminal.methods_markdown(classes), nl=False)
    elif name:
        Console().print(terminal.method_card(classes[0]))
    else:
        Console().print(terminal.methods_table(classes))


@app.command()
def check(recipe: RecipeFile, set_: Overrides = None) -> None:
    """Say what a recipe would train, on how many tokens, with what memory, and what is wrong."""
    _inspect(_load(recipe, list(set_ or []), None))


@app.command()
def version() -> None:
    """Print the versions of keeptune and of the libraries under it."""
    for package in ("keeptune", "torch", "transformers", "trl", "peft", "datasets"):
        typer.echo(f"{package} {installed(package)}")


def _load(recipe: Path, changes: Sequence[str], out: Path | None) -> Recipe:
    from keeptune.recipe import load_recipe

    loaded = load_recipe(recipe, changes)
    if out is None and loaded.out is None:
        out = Path("runs") / recipe.stem
    if out is None:
        return loaded
    return load_recipe(recipe, [*changes, f"out={json.dumps(str(out), ensure_ascii=False)}"])


def _inspect(recipe: Recipe) -> None:
    from keeptune.inspection import inspect

    found = inspect(recipe)
    for line in found.lines:
        typer.echo(line)
    if found.problems:
        _complain("\n".join(found.problems))
        raise typer.Exit(2)


@contextmanager
def _working(again: Sequence[str]) -> Iterator[Progress]:
    """Progress for a long command; Ctrl-C ends it with the command that continues it."""
    from keeptune.processes import is_first
    from keeptune.progress import Silent, choose

    progress = choose(sys.stderr) if is_first() else Silent()
    progress.note("loading libraries, model and data")
    with stoppable(continued_by(again)):
        try:
            yield progress
        finally:
            progress.close()


def _show(folder: RunFolder) -> None:
    from rich.console import Console

    from keeptune import terminal
    from keeptune.checks import run_checks
    from keeptune.metrics import summarise
    from keeptune.processes import is_first
    from keeptune.report import write

    if not is_first():
        return
    page = write([folder.path], None)
    console = Console()
    console.print(terminal.scores_table(summarise(folder)))
    console.print(terminal.findings_text(run_checks(folder)))
    typer.echo(f"\nRun folder: {folder.path}")
    typer.echo(f"Report:     {page}")


def _complain(message: str) -> None:
    lines = message.splitlines()
    if len(lines) > 1:
        message = "\n  ".join([f"{len(lines)} problems:", *lines])
    typer.echo(f"keeptune: {message}", err=True)
