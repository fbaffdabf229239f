"""keeptune repair: as much of a tuning as a budget allows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keeptune.errors import RecipeError

if TYPE_CHECKING:
    from keeptune.guard import Guard
    from keeptune.recipe_parts import BudgetRecipe
    from keeptune.watchlog import Frontier


def repair(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model before tuning: hub id or folder.")
    ],
    tuned: Annotated[
        str,
        typer.Argument(metavar="TUNED", help="The model after it, or its LoRA adapter."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the model.")],
    guard: Annotated[
        list[str],
        typer.Option(
            metavar="GUARD",
            help="What must not get worse: a ready-made guard such as capitals, NAME=FILE with "
            "rows, or NAME=FILE.txt with text; may be given many times.",
        ),
    ],
    budget: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=LOSS",
            help="How far a guard may fall against BASE: points of its score, or for a text its "
            "perplexity's relative rise (0.02 is 2 %); may be given many times.",
        ),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Rows of what was tuned for, to be shown."),
    ] = None,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="How sure it must be.")
    ] = 0.95,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Divides the guards' rows in halves.")] = 0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with BASE.")
    ] = False,
) -> None:
    """Take back as much of a tuning as guards need, for a model that keeptune did not train.

    Models on the line from BASE to TUNED are tried; the furthest whose guards have surely lost no
    more than the budget is written to OUT, with repair.json beside it. BASE and TUNED stay as they
    are.
    """
    allowed = _budget(budget, confidence)
    from keeptune.progress import choose
    from keeptune.repair import repair as repair_model
    from keeptune.runs import quiet

    progress = choose(sys.stderr)
    try:
        with quiet():
            done = repair_model(
                base,
                tuned,
                out,
                guards=[found for word in guard for found in _guards(word, "--guard")],
                tasks=[found for word in task or () for found in _guards(word, "--task")],
                budget=allowed,
                seed=seed,
                batch_size=batch_size,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
    finally:
        progress.close()
    _show(done.frontier)
    typer.echo(f"Repaired: {done.path}, {100 * done.frontier.mix:.0f} % of the tuning")


def _budget(words: list[str], confidence: float) -> BudgetRecipe:
    from pydantic import ValidationError

    from keeptune.recipe_parts import BudgetRecipe

    losses = {}
    for word in words:
        name, found, loss = word.partition("=")
        if name in BudgetRecipe.model_fields:
            raise RecipeError(
                f"--budget {word}: {name} is a setting of budgets. Give the guard another name."
            )
        try:
            losses[name] = float(loss) if found else float("nan")
        except ValueError:
            losses[name] = float("nan")
        if not losses[name] >= 0:
            raise RecipeError(f"--budget {word}: give NAME=LOSS with a loss from 0, as facts=1.0.")
    try:
        return BudgetRecipe.model_validate({**losses, "confidence": confidence})
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"])
        raise RecipeError(f"--budget {' '.join(words)}: {reason}.") from error


def _guards(word: str, option: str) -> list[Guard]:
    from keeptune.guard import read_guard
    from keeptune.recipe_parts import RowsGuard, TextGuard

    name, is_own, file = word.partition("=")
    if not is_own:
        return read_guard(word, where=option)
    if not (name.strip() and file.strip()):
        raise RecipeError(f"{option} {word}: give NAME=FILE, both of them, as chat=chat.jsonl.")
    if Path(file).suffix == ".txt":
        return read_guard(TextGuard(name=name, text=file), where=option)
    return read_guard(RowsGuard(name=name, eval=file), where=option)


def _show(frontier: Frontier) -> None:
    from rich.console import Console

    from keeptune import terminal

    Console().print(terminal.frontier_table(frontier))
