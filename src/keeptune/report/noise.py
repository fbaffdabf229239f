"""What the report and the command line show of how much a run's numbers vary by chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from keeptune.floors import deviation, floor
from keeptune.metrics import DEFINITIONS
from keeptune.records import Noise, Spread, Unit
from keeptune.units import UNITS, Shown
from keeptune.wording import number, unit_of

MEANS = 3  # runs on each side, beside single ones


@dataclass(frozen=True)
class NoiseView:
    """How much numbers vary by chance.

    Attributes:
        said: How that was measured, and what it means.
        columns: Titles.
        rows: The kind, the name, and a cell a column: what varies, then the smallest differences.
        floors: By kind and name, the smallest difference between two single runs.
    """

    said: str
    columns: list[str]
    rows: list[tuple[str, str, list[str]]]
    floors: dict[tuple[str, str], str]


def noise_view(noise: Noise) -> NoiseView:
    """The record as a table."""
    seeds = len(noise.seeds)
    columns = ["scored again", "other examples", "other seeds", "two runs differ"]
    columns += [f"means of {MEANS} differ"] if seeds > 1 else []
    return NoiseView(
        said=_said(noise),
        columns=columns,
        rows=[(s.kind, title(s), _cells(s)) for s in noise.spreads],
        floors={(s.kind, s.name): size_text(floor(s, 1, 1), s.unit) for s in noise.spreads},
    )


def _said(noise: Noise) -> str:
    seeds = len(noise.seeds)
    if seeds < 2:
        return (
            "No other seed was run: the smallest difference knows scoring and the choice of "
            "examples, not the randomness of training."
        )
    few = "; with so few seeds it is wide" if seeds < 4 else ""
    return (
        f"Seeds {', '.join(map(str, noise.seeds))} of the same recipe{few}. In 19 of 20 cases, two "
        "runs of it differ by less than the smallest difference."
    )


def title(spread: Spread) -> str:
    """A task's or guard's name, or a metric's title."""
    if spread.kind != "metric":
        return spread.name
    key = spread.name.removesuffix("_perplexity")
    return next(d.title[UNITS.index(spread.unit)] for d in DEFINITIONS if d.key == key)


def _cells(spread: Spread) -> list[str]:
    parts: Sequence[float | None] = (
        deviation(spread.again),
        spread.examples,
        deviation(spread.seeds),
        floor(spread, 1, 1),
    )
    parts = [*parts, floor(spread, MEANS, MEANS)] if len(spread.seeds) > 1 else parts
    return ["–" if part is None else size_text(part, spread.unit) for part in parts]


def size_text(size: float, unit: Unit) -> str:
    """`2.3 points`, or `1.4 %` of a perplexity."""
    shown: Shown = "points" if unit == "share" else "relative"
    value = size if unit == "share" else math.expm1(size)
    return number(value, shown, digits=1, sign=False) + unit_of(shown)
