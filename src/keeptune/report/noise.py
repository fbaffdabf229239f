"""What the report and the command line show of how much a run's numbers vary by chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from keeptune.floors import deviation, floor
from keeptune.metrics import find
from keeptune.ranking import KEYS
from keeptune.records import Noise, Spread, Unit
from keeptune.results import CHANGES
from keeptune.units import UNITS, Shown
from keeptune.wording import number, unit_of

MEANS = 3  # runs on each side, beside single ones


@dataclass(frozen=True)
class NoiseRow:
    """One number: its cells, one a column; `is_main` where strategies are ranked by it."""

    kind: str
    name: str
    cells: list[str]
    is_main: bool


@dataclass(frozen=True)
class NoiseView:
    """How much numbers vary by chance.

    Attributes:
        said: How that was measured, and what the columns mean.
        columns: Titles: three of what one run varies by, then what means something.
        rows: One a task, guard and metric.
        floors: By kind and name, the smallest difference between two single runs.
    """

    said: str
    columns: list[str]
    rows: list[NoiseRow]
    floors: dict[tuple[str, str], str]


def noise_view(noise: Noise) -> NoiseView:
    """The record as a table."""
    seeds = len(noise.seeds)
    columns = ["scored again", "examples", "seeds", "change", "two runs"]
    columns += [f"means of {MEANS}"] if seeds > 1 else []
    names = [spread.name for spread in noise.spreads if spread.kind in ("task", "guard")]
    return NoiseView(
        said=_said(noise),
        columns=columns,
        rows=[
            NoiseRow(s.kind, title(s), _cells(s, _of_one(s, noise)), s.name in (*KEYS, *names))
            for s in noise.spreads
            if s.kind not in CHANGES
        ],
        floors={(s.kind, s.name): size_text(floor(s, 1, 1), s.unit) for s in noise.spreads},
    )


def _said(noise: Noise) -> str:
    seeds = ", ".join(map(str, noise.seeds))
    is_alone = len(noise.seeds) < 2
    parts = [
        "One run varies by so much when it is scored again, and by the choice of examples"
        + ("." if is_alone else f" and of the seed ({seeds})."),
        "Then the smallest change in one run that means something, and the smallest difference "
        "between two: chance alone makes smaller ones in 19 of 20 cases.",
    ]
    if is_alone:
        parts.append("No other seed was run: the randomness of training is not in it.")
    elif len(noise.seeds) < 4:
        parts.append("So few seeds make it wide.")
    return " ".join(parts)


def title(spread: Spread) -> str:
    """A task's or guard's name, or a metric's title."""
    if spread.kind != "metric":
        return spread.name
    return find(spread.name)[0].title[UNITS.index(spread.unit)]


def _of_one(spread: Spread, noise: Noise) -> Spread | None:
    """What decides whether one run's change means something; None where there is no change."""
    if spread.kind == "metric":
        return None if find(spread.name)[0].scale == "level" else spread
    changes = [s for s in noise.spreads if s.kind in CHANGES and s.name == spread.name]
    return changes[-1] if changes else None


def _cells(spread: Spread, of_one: Spread | None) -> list[str]:
    parts: Sequence[float | None] = (
        deviation(spread.again),
        spread.examples,
        deviation(spread.seeds),
        floor(of_one, 1) if of_one else None,
        floor(spread, 1, 1),
    )
    parts = [*parts, floor(spread, MEANS, MEANS)] if len(spread.seeds) > 1 else parts
    return ["–" if part is None else size_text(part, spread.unit) for part in parts]


def size_text(size: float, unit: Unit) -> str:
    """`2.3 points`, or `1.4 %` of a perplexity."""
    shown: Shown = "points" if unit == "share" else "relative"
    value = size if unit == "share" else math.expm1(size)
    return number(value, shown, digits=1, sign=False) + unit_of(shown)
