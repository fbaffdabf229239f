"""Ready-made guards: abilities that most models have before any training.

A recipe names them: `guards: [facts]`. Each is rows with a score; "facts" is all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from keeptune.errors import suggest
from keeptune.guards import facts
from keeptune.rows import Row, Rows, read_rows

# Rows and their score. Ranking four options goes on working long after a model has stopped giving
# the answer, so it is used only where an answer has several right wordings (peso, Mexican peso).
GUARDS: Mapping[str, tuple[Callable[[], list[Row]], str]] = {
    "capitals": (facts.capitals, "greedy_match"),
    "continents": (facts.continents, "greedy_match"),
    "currencies": (facts.currencies, "choice"),
}
GROUPS: Mapping[str, tuple[str, ...]] = {"facts": ("capitals", "continents", "currencies")}


def names() -> list[str]:
    """The names that a recipe may use, groups last."""
    return [*GUARDS, *GROUPS]


def load(name: str) -> list[tuple[str, Rows, str]]:
    """Make a ready-made guard.

    Args:
        name: One of `names()`; a group gives all of its guards.

    Returns:
        Each guard's name, rows and score.

    Raises:
        DataError: The package that the rows are made from is not installed.
    """
    wanted = GROUPS.get(name, (name,))
    return [
        (one, read_rows(make(), field=f"guard {one!r}"), score)
        for one in wanted
        for make, score in [GUARDS[one]]
    ]


def unknown(name: str) -> str:
    """Say that there is no such guard, and which there are."""
    return f"There is no ready-made guard {name!r}. {suggest(name, names())}"
