"""What the report shows of several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keeptune.comparison import Group
from keeptune.intervals import Estimate, over_seeds
from keeptune.report.axes import DotPlot, DotRow, Lane, Scatter, axis_for, mark, scatter
from keeptune.tracks import Track
from keeptune.units import UNITS, Shown
from keeptune.wording import estimate_text, unit_of

COLUMNS = (
    "learning_gain",
    "learning_gain_perplexity",
    "guard_kept",
    "guard_change_perplexity",
    "backward_transfer",
    "backward_transfer_perplexity",
    "average_accuracy",
    "average_accuracy_perplexity",
    "forgetting",
    "intransigence",
)
COLOURS = 6


@dataclass(frozen=True)
class ComparisonCell:
    """A metric of one group, and what it is more (or less) than in plain fine-tuning."""

    text: str
    difference: str
    is_clear: bool


@dataclass(frozen=True)
class ComparisonRow:
    """One group in the table; `style` is its colour."""

    group: Group
    style: str
    cells: list[ComparisonCell]
    seconds: float
    peak_memory: int


@dataclass(frozen=True)
class ComparisonView:
    """Several groups side by side.

    Attributes:
        columns: Titles of the metrics in the table.
        rows: One a group.
        scatter: Learned against kept; None where no two groups have both.
        ends: Where each task and guard ended in each group, one plot a unit.
        has_plain: Whether differences to plain fine-tuning are shown.
    """

    columns: list[str]
    rows: list[ComparisonRow]
    scatter: Scatter | None
    ends: list[DotPlot]
    has_plain: bool


def comparison_view(groups: Sequence[Group]) -> ComparisonView:
    """Everything that the runs have in common, side by side."""
    styles = _styles(groups)
    first = {m.key: m for g in groups for m in reversed(g.metrics)}
    keys = [k for k in COLUMNS if any(_value(g, k) is not None for g in groups)]
    rows = []
    for group, style in zip(groups, styles, strict=True):
        costs = [r.folder.cost() for r in group.results]
        seconds = sum(p.seconds for c in costs for p in c.phases) / len(costs)
        cells = [_cell(group, key) for key in keys]
        memory = max(c.peak_memory_bytes for c in costs)
        rows.append(ComparisonRow(group, style, cells, seconds, memory))
    return ComparisonView(
        columns=[first[key].title for key in keys],
        rows=rows,
        scatter=_scatter(groups, styles),
        ends=[plot for unit in UNITS if (plot := _ends(groups, styles, unit))],
        has_plain=any(g.differences for g in groups),
    )


def _styles(groups: Sequence[Group]) -> list[str]:
    styles, used = [], 0
    for group in groups:
        styles.append("run-plain" if group.is_plain else f"run-{used % COLOURS + 1}")
        used += not group.is_plain
    return styles


def _value(group: Group, key: str) -> float | None:
    metric = group.metric(key)
    return metric.estimate.value if metric else None


def _cell(group: Group, key: str) -> ComparisonCell:
    metric, gap = group.metric(key), group.differences.get(key)
    if metric is None:
        return ComparisonCell("–", "", False)
    shown: Shown = "points" if metric.shown in ("share", "points") else "relative"
    clear = gap is not None and (gap.is_above or gap.is_below)
    difference = "" if gap is None else estimate_text(gap, shown).replace(unit_of("points"), "")
    return ComparisonCell(estimate_text(metric.estimate, metric.shown), difference, clear)


def _scatter(groups: Sequence[Group], styles: Sequence[str]) -> Scatter | None:
    learned: tuple[Shown, str] = ("points", "Learned, points")
    for key, title, shown in (
        ("guard_kept", "Kept of what it knew before", "share"),
        ("backward_transfer", "Change of earlier tasks, points", "points"),
    ):
        pairs = [
            (g.label, s, x.estimate, y.estimate)
            for g, s in zip(groups, styles, strict=True)
            if (x := g.metric("learning_gain")) and (y := g.metric(key))
            if x.estimate.value is not None and y.estimate.value is not None
        ]
        if len(pairs) > 1:
            unit: Shown = "share" if shown == "share" else "points"
            return scatter(pairs, learned, (unit, title))
    return None


def _ends(groups: Sequence[Group], styles: Sequence[str], unit: str) -> DotPlot | None:
    names = dict.fromkeys(
        (kind, t.name)
        for g in groups
        for kind, tracks in (("task", g.summaries[0].tasks), ("guard", g.summaries[0].guards))
        for t in tracks
        if t.unit == unit
    )
    before = {key: _track(groups[0], *key, "before") for key in names}
    after = {key: [_track(g, *key, "after") for g in groups] for key in names}
    if not names:
        return None
    every = [e for key in names for e in (before[key], *after[key])]
    axis = axis_for("share" if unit == "share" else "perplexity", every)
    rows = []
    for key in names:
        lanes = [Lane("before training", "before", mark(before[key], axis))]
        lanes += [
            Lane(g.label, style, mark(estimate, axis))
            for g, style, estimate in zip(groups, styles, after[key], strict=True)
        ]
        rows.append(DotRow(key[1], lanes, key[0]))
    return DotPlot(axis, rows)


def _track(group: Group, kind: str, name: str, when: str) -> Estimate | None:
    """A task's or guard's score in a group: of its one run, or the mean over seeds."""
    found: list[Estimate] = []
    for summary in group.summaries:
        tracks: list[Track] = summary.tasks if kind == "task" else summary.guards
        found += [t.before if when == "before" else t.after for t in tracks if t.name == name]
    if not found:
        return None
    return found[0] if len(found) == 1 else over_seeds([e.value for e in found])
