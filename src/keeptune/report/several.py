"""What the report shows of several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from keeptune.comparison import Group
from keeptune.intervals import Estimate
from keeptune.ranking import KEYS, front
from keeptune.report.axes import DotPlot, DotRow, Lane, Scatter, axis_for, mark, scatter
from keeptune.report.standing import RunRow, Standing, run_rows, standing
from keeptune.tracks import Track
from keeptune.units import UNITS, Shown, mean_over_seeds, shown_as
from keeptune.wording import estimate_text, unit_of

COLUMNS = (*KEYS, "forgetting", "intransigence")
COLOURS = 6


@dataclass(frozen=True)
class ComparisonCell:
    """A metric of one group, and what it is more (or less) than in plain fine-tuning."""

    text: str
    difference: str
    is_clear: bool


@dataclass(frozen=True)
class ComparisonRow:
    """One group in the table; `style` is its colour, `runs` says how many runs it has."""

    group: Group
    style: str
    runs: str
    cells: list[ComparisonCell]
    seconds: float
    training: float
    peak_memory: int


@dataclass(frozen=True)
class TaskRow:
    """One task in one group: when learned, at the end, and the change between."""

    task: str
    label: str
    style: str
    learned: str
    after: str
    change: str


@dataclass(frozen=True)
class ComparisonView:
    """Several groups side by side.

    Attributes:
        columns: Titles of the metrics in the table.
        rows: One a group.
        scatter: Learned against kept; None where no two groups have both.
        standing: Ranks and tests.
        ends: Where each task and guard ended in each group, one plot a unit.
        tasks: Each task in each group.
        runs: Every run.
        several_orders: Whether some group has its tasks in several orders.
        has_plain: Whether differences to plain fine-tuning are shown.
    """

    columns: list[str]
    rows: list[ComparisonRow]
    scatter: Scatter | None
    standing: Standing
    ends: list[DotPlot]
    tasks: list[TaskRow]
    runs: list[RunRow]
    several_orders: bool
    has_plain: bool


def comparison_view(
    groups: Sequence[Group], failed: Sequence[tuple[Path, str]] = ()
) -> ComparisonView:
    """Everything that the runs have in common, side by side.

    Args:
        groups: The finished runs.
        failed: Folders of runs that failed, and why.
    """
    styles = _styles(groups)
    first = {m.key: m for g in groups for m in reversed(g.metrics)}
    keys = [k for k in COLUMNS if any(_value(g, k) is not None for g in groups)]
    rows = []
    for group, style in zip(groups, styles, strict=True):
        costs = [r.folder.cost() for r in group.results]
        seconds = sum(p.seconds for c in costs for p in c.phases) / len(costs)
        cells = [_cell(group, key) for key in keys]
        memory = max(c.peak_memory_bytes for c in costs)
        training = group.training_seconds
        rows.append(ComparisonRow(group, style, _runs(group), cells, seconds, training, memory))
    figure = _scatter(groups, styles)
    return ComparisonView(
        columns=[first[key].title for key in keys],
        rows=rows,
        scatter=figure,
        standing=standing(groups, styles, figure),
        ends=[plot for unit in UNITS if (plot := _ends(groups, styles, unit))],
        tasks=_tasks(groups, styles),
        runs=run_rows(groups, failed),
        several_orders=any(len(g.orders) > 1 for g in groups),
        has_plain=any(g.differences for g in groups),
    )


def _runs(group: Group) -> str:
    """`3 seeds`, `3 seeds, 2 orders`, or "" for a single run."""
    counts = [(len(group.seeds), "seed"), (len(group.orders), "order")]
    words = [f"{n} {word}s" for n, word in counts if n > 1]
    runs = len(group.results)
    if runs != len(group.seeds) * len(group.orders):
        words.append(f"{runs} runs")
    return ", ".join(words)


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
            (g, (g.label, s, x.estimate, y.estimate, g.training_seconds))
            for g, s in zip(groups, styles, strict=True)
            if (x := g.metric("learning_gain")) and (y := g.metric(key))
            if x.estimate.value is not None and y.estimate.value is not None
        ]
        if len(pairs) > 1:
            unit: Shown = "share" if shown == "share" else "points"
            ranked = [i for i, (group, _) in enumerate(pairs) if not group.is_joint]
            points = [(spot[2].value or 0.0, spot[3].value or 0.0) for _, spot in pairs]
            best = {ranked[i] for i in front([points[i] for i in ranked])}
            return scatter([spot for _, spot in pairs], learned, (unit, title), best)
    return None


def _tasks(groups: Sequence[Group], styles: Sequence[str]) -> list[TaskRow]:
    names = list(dict.fromkeys(t.name for g in groups for t in g.summaries[0].tasks))
    rows = []
    for name in names:
        for group, style in zip(groups, styles, strict=True):
            tracks = [t for s in group.summaries for t in s.tasks if t.name == name]
            if not tracks:
                continue
            unit = tracks[0].unit
            shown = shown_as("change", unit)
            ends = ([t.learned for t in tracks], [t.after for t in tracks])
            texts = [estimate_text(_mean(each, unit), unit) for each in ends]
            texts.append(estimate_text(_mean([t.change for t in tracks], shown), shown))
            rows.append(TaskRow(name, group.label, style, *texts))
    return rows


def _mean(estimates: Sequence[Estimate | None], shown: Shown) -> Estimate | None:
    """Of one run its own; of several, the mean over them."""
    found = [e for e in estimates if e is not None]
    if len(found) < 2:
        return found[0] if found else None
    return mean_over_seeds([e.value for e in found], shown)


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
    of_kind = [s.tasks if kind == "task" else s.guards for s in group.summaries]
    tracks: list[Track] = [t for each in of_kind for t in each if t.name == name]
    ends = [t.before if when == "before" else t.after for t in tracks]
    return _mean(ends, tracks[0].unit) if tracks else None
