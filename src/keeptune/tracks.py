"""One task or guard from before training to now, with intervals."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from keeptune.formulas import share_kept
from keeptune.intervals import Estimate, with_interval
from keeptune.records import Unit
from keeptune.results import Column
from keeptune.units import convert, shown_as


@dataclass(frozen=True)
class Track:
    """One task or guard from before training to now.

    Attributes:
        name: Its name.
        unit: "share" or "perplexity"; levels are in this unit.
        n: Number of examples.
        before: Before any training.
        learned: Right after its own training; None for a guard.
        after: Now.
        gain: `learned` − `before`, in points or relative; None for a guard.
        change: What came after: now against `learned` (task) or `before` (guard).
        kept: `after` / `learned` or `before`, for shares; no value for perplexities.
    """

    name: str
    unit: Unit
    n: int
    before: Estimate
    learned: Estimate | None
    after: Estimate
    gain: Estimate | None
    change: Estimate
    kept: Estimate


def level(column: Column, row: int) -> Estimate:
    """The score in one row, in its own unit."""
    estimate = with_interval(column.goodness[row], column.draws[:, row], column.n)
    return convert(estimate, "level", shown_as("level", column.info.unit))


def difference(column: Column, row: int, since: int, floor: float = 0.0) -> Estimate:
    """The change from one row to a later one, paired, in points or relative."""
    with np.errstate(invalid="ignore"):
        value = column.goodness[row] - column.goodness[since]
        draws = column.draws[:, row] - column.draws[:, since]
    shown = shown_as("change", column.info.unit)
    found = replace(with_interval(value, draws, column.n), floor=floor)
    return convert(found, "change", shown)


def _kept(column: Column, row: int, since: int) -> Estimate:
    if column.info.unit != "share":
        return Estimate(None, n=column.n)
    pair = [since, row]
    value = share_kept(column.goodness[pair][:, np.newaxis])
    draws = share_kept(column.draws[:, pair, np.newaxis])
    return with_interval(value, draws, column.n)


def first_known(column: Column) -> int:
    """The first row in which a column was evaluated; 0 when in none."""
    return next((row for row, cell in enumerate(column.cells) if cell), 0)


def task_track(column: Column, index: int) -> Track:
    """The task at position `index` of the stream, which is learned already."""
    own, last, first = index + 1, len(column.cells) - 1, first_known(column)
    later = last > own
    none = Estimate(None, n=column.n)
    return Track(
        name=column.info.name,
        unit=column.info.unit,
        n=column.n,
        before=level(column, first) if first < own else none,
        learned=level(column, own),
        after=level(column, last),
        gain=difference(column, own, first, column.gain_floor) if first < own else none,
        change=difference(column, last, own, column.change_floor) if later else none,
        kept=_kept(column, last, own) if later else none,
    )


def guard_track(column: Column) -> Track:
    """A guard from row 0 to the last row."""
    none = Estimate(None, n=column.n)
    last = len(column.cells) - 1
    return Track(
        name=column.info.name,
        unit=column.info.unit,
        n=column.n,
        before=level(column, 0) if column.cells else none,
        learned=None,
        after=level(column, last) if last > 0 else none,
        gain=None,
        change=difference(column, last, 0, column.change_floor) if last > 0 else none,
        kept=_kept(column, last, 0) if last > 0 else none,
    )
