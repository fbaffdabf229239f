"""What the report shows of watching and of the budget: curves over steps, and over their share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from keeptune.controller import LARGEST
from keeptune.folder import RunFolder
from keeptune.intervals import Estimate
from keeptune.report.axes import Axis, axis_for, mark
from keeptune.units import Shown, convert, shown_as
from keeptune.watchlog import Frontier, Look, Point, Tried, frontiers, looks
from keeptune.wording import estimate_text, value_text

Ticks = list[tuple[float, str]]
Cells = list[str]
EFFORT = "how hard the methods hold"


@dataclass(frozen=True)
class Dot:
    """One score; all but `text` in percent from the top left. `is_sure` fills it."""

    x: float
    y: float
    low: float
    high: float
    text: str
    is_sure: bool = True


@dataclass
class Curve:
    """One guard or task over steps, or over shares of a step.

    Attributes:
        name: Its name.
        kind: "task", "guard" or "before", for its colour.
        what: What it shows, in a few words.
        ticks: Of the upright axis.
        below: Of the level axis.
        lines: The curve in its pieces, as SVG points.
        dots: Its scores.
        cuts: Dashed upright lines.
        limit: Percent from the top of a dashed level line, if there is one.
    """

    name: str
    kind: str
    what: str
    ticks: Ticks
    below: Ticks
    lines: list[str] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    cuts: list[float] = field(default_factory=list)
    limit: float | None = None

    @property
    def text(self) -> str:
        """All scores in words."""
        return ", ".join(dot.text for dot in self.dots)


@dataclass(frozen=True)
class WatchView:
    """Curves over the steps of the stream, their table, and what was done.

    `is_steered` says whether it was looked at to find how hard the methods must hold.
    """

    curves: list[Curve]
    heads: Cells
    rows: list[Cells]
    acts: Cells
    overhead: str
    is_steered: bool


@dataclass(frozen=True)
class BudgetView:
    """Curves over the share of one task's step, their table, and the share taken."""

    task: str
    taken: str
    curves: list[Curve]
    names: Cells
    rows: list[Cells]


# -- watching -------------------------------------------------------------------------------------


def watch_view(folder: RunFolder) -> WatchView | None:
    """The looks of a run; None without any."""
    every = looks(folder)
    if not every:
        return None
    starts, total = _starts(every)
    names = list(dict.fromkeys(point.name for look in every for point in look.points))
    shares = {look.index: look.overhead for look in every}
    curves = [_over_steps(name, every, starts, total) for name in names]
    steered = [look for look in every if look.effort is not None]
    return WatchView(
        curves=[*curves, _efforts(steered, starts, total)] if steered else curves,
        heads=["task", "step", *names, *([EFFORT] if steered else []), "action"],
        rows=[_row(look, names, is_steered=bool(steered)) for look in every],
        acts=[_act(look) for look in every if look.action],
        overhead=f"{100 * max(shares.values()):.0f}",
        is_steered=bool(steered),
    )


def _starts(every: Sequence[Look]) -> tuple[dict[int, int], int]:
    """Steps before each task, and in all."""
    lengths = {look.index: look.steps for look in every}
    lengths |= {k.index: k.step for k in every if k.action in ("stop", "rollback")}
    starts, total = {}, 0
    for index, length in sorted(lengths.items()):
        starts[index], total = total, total + length
    return starts, max(total, 1)


def _over_steps(name: str, every: Sequence[Look], starts: dict[int, int], total: int) -> Curve:
    own = [(look, point) for look in every for point in look.points if point.name == name]
    first = own[0][1]
    axis = axis_for(first.unit, [Estimate(point.score) for _, point in own])
    tasks = {look.index: look.task for look, _ in own}
    curve = Curve(
        name=name,
        kind="guard" if first.role == "guard" else "task",
        what="guard" if first.role == "guard" else "task",
        ticks=[(_height(axis, at), label) for at, label in axis.ticks[::2]],
        below=_steps(total),
        cuts=_beginnings(tasks, starts, total),
    )
    curve.what += ", perplexity" if first.unit == "perplexity" else ""
    for index in tasks:
        dots = []
        for look, point in own:
            if look.index == index:
                x = round(100 * (starts[index] + look.step) / total, 2)
                y = _height(axis, axis.at(point.score))
                text = value_text(Estimate(point.score), point.unit)
                dots.append(Dot(x, y, y, y, text, not point.is_below))
        curve.dots += dots
        curve.lines.append(" ".join(f"{dot.x},{dot.y}" for dot in dots))
    return curve


def _efforts(steered: Sequence[Look], starts: dict[int, int], total: int) -> Curve:
    """How hard the methods held, on a scale from 1 to the most in powers."""
    curve = Curve(
        name=EFFORT,
        kind="before",
        what="times what they are set to",
        ticks=[(100.0, "1"), (50.0, f"{LARGEST**0.5:.0f}"), (0.0, f"{LARGEST:.0f}")],
        below=_steps(total),
        cuts=_beginnings([look.index for look in steered], starts, total),
    )
    for index in dict.fromkeys(look.index for look in steered):
        dots = []
        for look in steered:
            if look.index == index and look.effort is not None:
                x = round(100 * (starts[index] + look.step) / total, 2)
                y = round(100 * (1 - math.log(look.effort) / math.log(LARGEST)), 2)
                dots.append(Dot(x, y, y, y, _times(look)))
        curve.dots += dots
        curve.lines.append(" ".join(f"{dot.x},{dot.y}" for dot in dots))
    return curve


def _steps(total: int) -> Ticks:
    return [(0.0, "0"), (100.0, f"step {total:,}")]


def _beginnings(indices: Iterable[int], starts: dict[int, int], total: int) -> list[float]:
    """Where tasks begin, but for the first."""
    return [round(100 * starts[i] / total, 2) for i in dict.fromkeys(indices) if starts[i]]


def _times(look: Look) -> str:
    return "–" if look.effort is None else f"{look.effort:.3g}\u00a0×"


def _row(look: Look, names: Sequence[str], *, is_steered: bool) -> Cells:
    shown = {point.name: point for point in look.points}
    cells = [_scored(shown[name]) if name in shown else "–" for name in names]
    effort = [_times(look)] if is_steered else []
    return [look.task, f"{look.step:,}", *cells, *effort, look.action]


def _scored(point: Point) -> str:
    change = estimate_text(*_change(point))
    score = value_text(Estimate(point.score), point.unit)
    return f"{score}; {change}" if point.change else score


def _act(look: Look) -> str:
    names = ", ".join(point.name for point in look.points if point.is_below)
    done = {
        "warn": "a warning was given",
        "stop": "the task ended there",
        "rollback": f"the task ended there, with the weights of step {look.back_to}",
        "strengthen": f"the methods held {_times(look)} as hard from there on",
    }
    return (
        f"Task {look.task}, step {look.step:,}: {names} fell below the line; {done[look.action]}."
    )


# -- budget ---------------------------------------------------------------------------------------


def budget_views(folder: RunFolder) -> list[BudgetView]:
    """What was tried after each task."""
    return [_budget(frontier) for frontier in frontiers(folder)]


def tried_table(frontier: Frontier) -> tuple[list[str], list[list[str]]]:
    """The names that were looked at, and a row of text for each step that was tried."""
    names = list(dict.fromkeys(p.name for tried in frontier.tried for p in tried.points))
    rows = [
        [
            _shares(tried),
            "search" if tried.sample == "search" else "confirmation",
            *(_changed(tried, name) for name in names),
            "yes" if tried.inside else "no",
        ]
        for tried in frontier.tried
    ]
    return names, rows


def _budget(frontier: Frontier) -> BudgetView:
    names, rows = tried_table(frontier)
    curves = [_over_shares(frontier, name) for name in names]
    if frontier.mixes is not None:
        curves.append(_by_block(frontier.mixes))
    return BudgetView(frontier.task, _shares(frontier), curves, names, rows)


def _shares(of: Tried | Frontier) -> str:
    """The share of the step, or those of the blocks from the lower layers to the upper."""
    every = [of.mix] if of.mixes is None else of.mixes
    return " / ".join(f"{100 * mix:.0f}" for mix in every) + "\u00a0%"


def _by_block(mixes: Sequence[float]) -> Curve:
    dots = [
        Dot(round(100 * (at + 0.5) / len(mixes), 2), y, y, y, f"{100 * mix:.0f}\u00a0%")
        for at, mix in enumerate(mixes)
        for y in [round(100 * (1 - mix), 2)]
    ]
    return Curve(
        name="the step of each block",
        kind="before",
        what="share of it that was taken",
        ticks=[(100.0, "0"), (50.0, "50"), (0.0, "100\u00a0%")],
        below=[(0.0, "lower layers"), (100.0, "upper")],
        lines=[" ".join(f"{dot.x},{dot.y}" for dot in dots)],
        dots=dots,
    )


def _changed(tried: Tried, name: str) -> str:
    found = [point for point in tried.points if point.name == name]
    return estimate_text(*_change(found[0])) if found else "–"


def _over_shares(frontier: Frontier, name: str) -> Curve:
    common = [tried for tried in frontier.tried if tried.mixes is None]
    every = sorted(common, key=lambda tried: tried.mix)
    own = [(t.mix, point, t) for t in every for point in t.points if point.name == name]
    first, shown = own[0][1], _change(own[0][1])[1]
    limit = None
    if first.allowed is not None:
        limit = convert(Estimate(-first.allowed), "change", shown)
    axis = axis_for(shown, [*(_change(point)[0] for _, point, _ in own), limit])
    zero = _height(axis, axis.at(0.0))
    curve = Curve(
        name=first.name,
        kind="guard" if first.role == "guard" else "task",
        what="what it learned" if first.role == "learning" else "what it lost",
        ticks=[(_height(axis, tick), label) for tick, label in axis.ticks],
        below=[(0.0, "0"), (100.0, "whole step")],
        cuts=[round(100 * frontier.mix, 2)] if frontier.mixes is None else [],
        limit=None if limit is None else _height(axis, axis.at(limit.value or 0.0)),
    )
    curve.dots.append(Dot(0.0, zero, zero, zero, "before", True))
    for mix, point, tried in own:
        placed = mark(_change(point)[0], axis)
        assert placed is not None
        y, low, high = (_height(axis, value) for value in (placed.at, placed.low, placed.high))
        fresh = tried.sample == "fresh"
        curve.dots.append(Dot(round(100 * mix, 2), y, low, high, placed.text, fresh))
    curve.lines = [" ".join(f"{dot.x},{dot.y}" for dot in curve.dots)]
    return curve


def _change(point: Point) -> tuple[Estimate, Shown]:
    shown = shown_as("change", point.unit)
    return convert(Estimate(point.change, point.low, point.high, point.n), "change", shown), shown


def _height(axis: Axis, at: float) -> float:
    """Percent from the top; less of a perplexity is better, and better is up."""
    return at if axis.shown in ("perplexity", "relative") else round(100 - at, 2)
