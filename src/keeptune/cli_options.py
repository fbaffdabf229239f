"""What several commands take: the recipe, and changes to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one value of the recipe, such as trainer.learning_rate=1e-4, "
        "tasks.0.score=choice or methods.1.ewc.strength=10; may be given many times.",
    ),
]
