"""Where the marks of each figure stand; the templates draw them as inline SVG.

Positions are percentages of the figure's width and height, so that a figure fills any screen while
its text and strokes keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keeptune.folder import RunFolder
from keeptune.records import Unit
from keeptune.report.axes import Axis, axis_for, mark
from keeptune.results import Column, Results
from keeptune.tracks import level
from keeptune.wording import estimate_text, unit_of, value_text

MOST_GHOSTS = 8
MOST_POINTS = 240


@dataclass(frozen=True)
class HeatCell:
    """One cell of R.

    Attributes:
        text: Its number.
        title: Its number with its interval.
        mix: How much of the colour, 0 to 100.
        state: "own" (just learned), "later", "before" (not learned yet) or "none".
    """

    text: str
    title: str
    mix: float
    state: str


def heat_map(results: Results) -> list[list[HeatCell]]:
    """R as rows of cells: the tasks, then the guards; row 0 is before training."""
    columns = [*results.tasks, *results.waiting, *results.guards]
    return [[_heat(c, i, row) for i, c in enumerate(columns)] for row in range(results.rows)]


def _heat(column: Column, index: int, row: int) -> HeatCell:
    if column.cells[row] is None:
        return HeatCell("–", "not evaluated", 0.0, "none")
    found = level(column, row)
    state = "later"
    if column.kind == "task" and row <= index + 1:
        state = "own" if row == index + 1 else "before"
    share = found.value or 0.0
    if column.info.unit == "perplexity":
        known = column.goodness[np.isfinite(column.goodness)]
        spread = float(np.ptp(known)) if known.size else 0.0
        share = (column.goodness[row] - known.min()) / spread if spread else 0.5
    text = value_text(found, column.info.unit).removesuffix(unit_of("share"))
    mix = round(100 * float(np.clip(share, 0, 1)), 1)
    return HeatCell(text, estimate_text(found, column.info.unit), mix, state)


@dataclass(frozen=True)
class Point:
    """One score of a curve; x and y in percent from the top left."""

    x: float
    y: float
    low: float
    high: float
    row: int
    text: str


@dataclass(frozen=True)
class Panel:
    """The curve of one task or guard over the stream.

    Attributes:
        name: Its name.
        kind: "task" or "guard".
        number: Position in the stream from 1; 0 for a guard.
        shown: The unit.
        ticks: Of the upright axis: percent from the top, label.
        points: Its scores.
        ghosts: The other curves of its kind, as SVG points, for context.
        rows: Of the level axis: percent, label, whether it is the task's own training.
    """

    name: str
    kind: str
    number: int
    shown: Unit
    ticks: list[tuple[float, str]]
    points: list[Point]
    ghosts: list[str]
    rows: list[tuple[float, str, bool]]

    @property
    def line(self) -> str:
        """The curve as SVG points."""
        return " ".join(f"{p.x},{p.y}" for p in self.points)


def panels(results: Results) -> list[Panel]:
    """One panel a task learned, one a guard; perplexities point down, as better is up."""
    if results.rows < 2:
        return []
    numbered = [(c, i + 1) for i, c in enumerate(results.tasks)]
    numbered += [(c, 0) for c in results.guards]
    axes = {id(c): _upright(c) for c, _ in numbered}
    points = {id(c): _points(c, axes[id(c)]) for c, _ in numbered}
    made = []
    for column, number_in_stream in numbered:
        like = [
            c
            for c, _ in numbered
            if (c.kind, c.info.unit) == (column.kind, column.info.unit) and c is not column
        ]
        shares = column.info.unit == "share" and len(like) < MOST_GHOSTS
        ghosts = [" ".join(f"{p.x},{p.y}" for p in points[id(c)]) for c in like if shares]
        axis = axes[id(column)]
        made.append(
            Panel(
                name=column.info.name,
                kind=column.kind,
                number=number_in_stream,
                shown=column.info.unit,
                ticks=[(_y(axis, at), label) for at, label in axis.ticks[::2]],
                points=points[id(column)],
                ghosts=ghosts,
                rows=_row_ticks(results.rows, number_in_stream),
            )
        )
    return made


def _upright(column: Column) -> Axis:
    levels = [level(column, row) for row, cell in enumerate(column.cells) if cell]
    return axis_for(column.info.unit, levels)


def _y(axis: Axis, at: float) -> float:
    return at if axis.shown == "perplexity" else round(100 - at, 2)


def _points(column: Column, axis: Axis) -> list[Point]:
    last, found = len(column.cells) - 1, []
    for row, cell in enumerate(column.cells):
        placed = mark(level(column, row), axis) if cell else None
        if placed:
            at, low, high = (_y(axis, v) for v in (placed.at, placed.low, placed.high))
            found.append(Point(round(100 * row / last, 2), at, low, high, row, placed.text))
    return found


def _row_ticks(rows: int, own: int) -> list[tuple[float, str, bool]]:
    last = rows - 1
    step = math.ceil(last / 6)
    kept = {0, last} | {r for r in range(0, last, step) if last - r >= step}
    return [
        (round(100 * r / last, 2), "before" if r == 0 else str(r), r == own and own > 0)
        for r in sorted(kept)
    ]


@dataclass(frozen=True)
class LossLine:
    """One task's losses: SVG points, where they start and how wide they are in percent."""

    task: str
    points: str
    start: float
    width: float
    first: float
    last: float


@dataclass(frozen=True)
class LossCurve:
    """Training loss over the steps of the whole stream.

    Attributes:
        lines: One a task.
        ticks: Of the upright axis: percent from the top, label.
        steps: Number of the last step.
    """

    lines: list[LossLine]
    ticks: list[tuple[float, str]]
    steps: int


def loss_curve(folder: RunFolder) -> LossCurve | None:
    """The logged losses, at most `MOST_POINTS` of them; None where nothing was logged."""
    logged = [
        (str(s.get("task", "")), int(s.get("step", 0)), float(s["loss"]))
        for s in folder.steps()
        if isinstance(s.get("loss"), (int, float)) and math.isfinite(s["loss"])
    ]
    if len(logged) < 2:
        return None
    tasks = list(dict.fromkeys(task for task, _, _ in logged))
    lengths = [max(step for t, step, _ in logged if t == task) for task in tasks]
    starts = dict(zip(tasks, np.cumsum([0, *lengths]).tolist(), strict=False))
    total = sum(lengths)
    top = max(loss for _, _, loss in logged) * 1.05 or 1.0
    every = math.ceil(len(logged) / MOST_POINTS)
    lines = []
    for task, length in zip(tasks, lengths, strict=True):
        own = sorted((step, loss) for t, step, loss in logged if t == task)
        points = [
            f"{100 * (starts[task] + step) / total:.1f},{100 - 100 * loss / top:.1f}"
            for step, loss in _thinned(own, every)
        ]
        start, width = (round(100 * part / total, 2) for part in (starts[task], length))
        lines.append(LossLine(task, " ".join(points), start, width, own[0][1], own[-1][1]))
    ticks = [(100 - 50.0 * i, f"{top * i / 2:.2g}") for i in range(3)]
    return LossCurve(lines, ticks, total)


def _thinned(points: Sequence[tuple[int, float]], every: int) -> list[tuple[int, float]]:
    """Means over `every` neighbours, so that no spike is shown or hidden by chance."""
    blocks = [points[i : i + every] for i in range(0, len(points), every)]
    return [(b[-1][0], sum(loss for _, loss in b) / len(b)) for b in blocks]
