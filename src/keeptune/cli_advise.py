"""keeptune advise: which methods for this case, and at what price."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keeptune.cli_compare import show_compared
from keeptune.cli_options import Overrides
from keeptune.cli_stopping import stoppable_runs
from keeptune.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from keeptune.advice import Advice, Asked
    from keeptune.recipe import Recipe

GIB = 2**30


def advise(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="[RECIPE]", help="The recipe, a YAML file; or give --model."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Without a recipe: a hub id, a folder, or demo.")
    ] = None,
    adapter: Annotated[
        str, typer.Option(help="Without a recipe: lora, or none for all weights.")
    ] = "lora",
    kind: Annotated[
        str, typer.Option(help="Without a recipe: causal_lm or classification.")
    ] = "causal_lm",
    length: Annotated[
        int, typer.Option(min=8, help="Without a recipe: tokens of the longest rows.")
    ] = 512,
    rows: Annotated[
        bool | None,
        typer.Option("--keep-rows/--no-rows", help="Whether old training rows may be kept."),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--not-private", help="Whether the training rows are private."),
    ] = None,
    known: Annotated[
        bool | None,
        typer.Option(
            "--task-known/--task-unknown",
            help="Whether it is known which task a question is of, when the model answers.",
        ),
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="How many tasks are to come, those listed included.")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="What must not be lost: tasks, base (what the model knew), or both."),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="Memory of a device in GiB; default: this machine's.")
    ] = None,
    slower: Annotated[
        float | None, typer.Option(help="At most so many times the time of plain training.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many strategies to show.")] = 4,
    write: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a recipe for each of them there.")
    ] = None,
    pilot: Annotated[
        bool,
        typer.Option("--pilot", help="Also try them out in short runs on a part of the data."),
    ] = False,
    rows_each: Annotated[
        int,
        typer.Option(
            "--rows",
            min=16,
            help="Of a pilot: training rows of a task, at most; a third "
            "of them is scored and not learned.",
        ),
    ] = 192,
    steps: Annotated[int, typer.Option(min=1, help="Of a pilot: steps of a task.")] = 60,
    seeds: Annotated[int, typer.Option(min=1, help="Of a pilot: runs of each strategy.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Of a pilot: runs at the same time.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder of a pilot; default: runs/NAME-pilot.")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Say which methods fit a case, why, on what evidence, and what they cost here.

    What is not said by an option is asked in a terminal, and else assumed and shown. Nothing is
    trained, and of the model only its config is read, unless there is a pilot. The same command
    goes on with a pilot that was stopped.
    """
    if pilot and recipe is None:
        raise RecipeError("--pilot trains on your data: give a recipe that names them.")
    loaded = _loaded(recipe, set_ or [], model, adapter, kind)
    given = {"rows": rows, "private": private, "known": known, "tasks": tasks, "keep": keep}
    asked = _case(loaded, given, memory, slower)
    typer.echo("reading data and counting the model", err=True)
    from keeptune.advising import advise as find
    from keeptune.advising import sizer_for, sizer_of_model

    sizer = sizer_of_model(loaded, length) if recipe is None else sizer_for(loaded)
    found = find(sizer, asked)[:top]
    _show(found, loaded, asked, write)
    plain = sizer.need([], max(asked.tasks - 1, 1))
    typer.echo(f"\nPlain training: {_price(plain, 1.0, 1.0)}.", err=True)
    if pilot:
        assert recipe is not None
        size = (rows_each, steps, seeds, jobs)
        _pilot(loaded, found, asked, out or Path("runs") / f"{recipe.stem}-pilot", size)


def _loaded(
    recipe: Path | None, changes: list[str], model: str | None, adapter: str, kind: str
) -> Recipe:
    """The recipe, or one to fill in for a model, which is asked for where nothing is given."""
    if recipe is not None:
        from keeptune.recipe import load_recipe

        return load_recipe(recipe, changes)
    from keeptune.advising import recipe_of

    if model is None and _asks():
        model = typer.prompt("Which model: a hub id, a folder, or demo?")
    if model is None:
        raise RecipeError("Give a recipe, or --model with a hub id, a folder, or demo.")
    return recipe_of(model, adapter, kind)


def _show(found: Sequence[Advice], recipe: Recipe, asked: Asked, write: Path | None) -> None:
    """The short list, with a recipe for each of it in a folder, or for the first one here."""
    from keeptune import yamltext
    from keeptune.advising import recipe_for, write_recipes

    paths: Sequence[Path | None] = [None] * len(found)
    if write is not None:
        paths = write_recipes(found, recipe, asked, write)
    for number, (one, path) in enumerate(zip(found, paths, strict=True), 1):
        for line in _shown(number, one, path):
            typer.echo(line)
    if write is None:
        typer.echo("\nA recipe for the first one (for all of them: --write DIR):\n")
        typer.echo(yamltext.write(recipe_for(found[0].rule, recipe, asked)), nl=False)


# What is asked where no option says it, and what is assumed where nobody can be asked.
QUESTIONS: dict[str, str] = {
    "private": "Are the training rows private?",
    "rows": "May old training rows be kept?",
    "known": "Is it known which task a question is of, when the model answers?",
    "tasks": "How many tasks are to come, those listed included?",
    "keep": "What must not be lost: tasks, base (what the model knew), or both?",
}


def _case(
    recipe: Recipe, given: dict[str, Any], memory: float | None, slower: float | None
) -> Asked:
    from keeptune.advice import Asked

    assumed: dict[str, Any] = {
        "private": False,
        "rows": True,
        "known": False,
        "tasks": len(recipe.tasks),
        "keep": "both",
    }
    if recipe.privacy == "strict":
        given["private"] = True
    asks = _asks()
    for name, question in QUESTIONS.items():
        if name == "rows" and given["private"]:
            given["rows"] = False
        elif given[name] is None:
            given[name] = _ask(question, assumed[name]) if asks else assumed[name]
            if not asks:
                typer.echo(f"assumed: {question} {_said(assumed[name])}", err=True)
    if given["keep"] not in ("tasks", "base", "both"):
        raise RecipeError(f"--keep {given['keep']}: give tasks, base or both.")
    return Asked(
        **given,
        classifies=recipe.kind == "classification",
        adapted=recipe.adapter != "none",
        memory=(memory * GIB) if memory is not None else _here(),
        slower=slower,
    )


def _asks() -> bool:
    """Whether somebody is there to answer."""
    return sys.stdin.isatty()


def _ask(question: str, default: Any) -> Any:
    if isinstance(default, bool):
        return typer.confirm(question, default=default)
    return typer.prompt(question, default=default, type=type(default))


def _said(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _here() -> float:
    """Bytes of this machine's GPU, or of its main memory."""
    import torch

    from keeptune.machine import memory

    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(memory())


def _shown(number: int, one: Advice, path: Path | None) -> list[str]:
    from keeptune.chain import Chain
    from keeptune.inspection import exports

    beyond = f"   (more {one.beyond} than there is)" if one.beyond else ""
    lines = [
        f"{number}. {one.rule.words}{beyond}",
        f"   why      {one.rule.reason}",
        f"   source   {'; '.join(one.rule.sources())}",
        f"   price    {_price(one.need, one.step, one.time)}",
        f"   export   {exports(Chain(one.rule.methods()))}",
    ]
    return [*lines, f"   recipe   {path}"] if path else lines


def _price(need: Any, step: float, time: float) -> str:
    from keeptune.inspection import gib

    return (
        f"{gib(need.memory)} of memory, a step {step:.2f} × plain, a task {time:.2f} ×, "
        f"{gib(need.state)} in a saved state"
    )


def _pilot(
    recipe: Recipe,
    found: Sequence[Advice],
    asked: Asked,
    out: Path,
    size: tuple[int, int, int, int],
) -> None:
    import shutil

    from keeptune import board, comparison, engines
    from keeptune.compare import compare, plan
    from keeptune.folder import RunFolder
    from keeptune.pilot import Size, pilot_recipe, standing, words_of

    rows, steps, seeds, jobs = size
    data = out / "data"
    short = pilot_recipe(recipe, data, Size(rows, steps), private=asked.private)
    words = words_of([one.rule for one in found])
    try:
        with stoppable_runs("The same command goes on."):
            planned = plan(short, out, methods=words, seeds=str(seeds))
            engine = engines.choose("local", at_once=jobs)
            done = compare(planned, out, board.choose(sys.stderr), engine)
    finally:
        if asked.private:
            shutil.rmtree(data)  # the same command draws the same rows again
    for line in standing(comparison.compare([RunFolder(job.folder) for job in done.done])):
        typer.echo(line)
    show_compared(done)
