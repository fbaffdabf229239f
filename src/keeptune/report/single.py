"""What the report shows of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keeptune.comparison import Group
from keeptune.folder import RunFolder
from keeptune.metrics import Metric, Summary
from keeptune.records import RunInfo
from keeptune.report.axes import Axis, DotPlot, DotRow, Lane, Mark, axis_for, mark
from keeptune.report.contradictions import Contradiction, contradictions
from keeptune.report.figures import HeatCell, LossCurve, Panel, heat_map, loss_curve, panels
from keeptune.report.flips import Flips, cut, flips
from keeptune.report.noise import NoiseView, noise_view
from keeptune.report.steered import BudgetView, WatchView, budget_views, watch_view
from keeptune.results import Results
from keeptune.tracks import Track
from keeptune.units import UNITS, shown_as
from keeptune.wording import estimate_text

PHASES = {
    "load": "loading the model",
    "train": "training",
    "end_task": "end of task",
    "watch": "watching",
    "budget": "finding the step inside the budget",
    "evaluate": "evaluation",
    "save": "saving",
}


@dataclass(frozen=True)
class MetricRow:
    """A metric with its place on the axis that all of its unit share; `zero` in percent."""

    metric: Metric
    mark: Mark | None
    zero: float | None


@dataclass(frozen=True)
class EvidenceRow:
    """What a method showed for one task; `state` is "active", "silent" or "not asked"."""

    task: str
    state: str
    proof: str
    others: list[tuple[str, str]]


@dataclass(frozen=True)
class EvidenceTable:
    """What one method showed; `since` is the first task from which it must show something."""

    method: str
    settings: str
    proof: str
    is_neutral: bool
    since: int
    rows: list[EvidenceRow]


@dataclass(frozen=True)
class RouteRow:
    """Of a task's questions, the share taken for its own, and what the others are taken for."""

    task: str
    right: float
    others: str


@dataclass(frozen=True)
class CostRow:
    """Seconds, share of all seconds, tokens, tokens per second of one kind of phase."""

    phase: str
    words: str
    seconds: float
    percent: float
    start: float
    tokens: int


@dataclass(frozen=True)
class RunView:
    """All that the template needs to show one run."""

    anchor: str
    label: str
    group: Group
    info: RunInfo
    path: str
    results: Results
    summary: Summary
    heat: list[list[HeatCell]]
    panels: list[Panel]
    watch: WatchView | None
    budget: list[BudgetView]
    guards: list[DotPlot]
    noise: NoiseView | None
    metrics: list[MetricRow]
    evidence: list[EvidenceTable]
    routes: list[RouteRow]
    flips: list[Flips]
    contradictions: list[Contradiction]
    cost: list[CostRow]
    seconds: float
    peak_memory: int
    stored: dict[str, int]
    loss: LossCurve | None
    recipe: str
    facts: list[tuple[str, str]]


def run_view(group: Group, position: int, flips_shown: int) -> RunView:
    """Everything about a group's first run, with the group's metrics."""
    results, summary = group.results[0], group.summaries[0]
    folder = results.folder
    cost = folder.cost()
    rows = _cost(folder)
    return RunView(
        anchor=f"run-{position + 1}",
        label=group.label,
        group=group,
        info=folder.info,
        path=str(folder.path),
        results=results,
        summary=summary,
        heat=heat_map(results),
        panels=panels(results),
        watch=watch_view(folder),
        budget=budget_views(folder),
        guards=_guards(summary),
        noise=noise_view(results.noise) if results.noise else None,
        metrics=metric_rows(group.metrics),
        evidence=_evidence(folder),
        routes=_routes(folder),
        flips=flips(results, flips_shown),
        contradictions=contradictions(results),
        cost=rows,
        seconds=sum(row.seconds for row in rows),
        peak_memory=cost.peak_memory_bytes,
        stored=cost.stored_bytes,
        loss=loss_curve(folder),
        recipe=(folder.path / "recipe.yaml").read_text("utf-8"),
        facts=_facts(folder.info.provenance),
    )


def metric_rows(metrics: list[Metric]) -> list[MetricRow]:
    """The metrics with their marks; all of one unit stand on one axis."""
    rows = []
    for metric in metrics:
        axis = axis_for(metric.shown, [m.estimate for m in metrics if m.shown == metric.shown])
        zero = axis.at(0.0) if metric.shown in ("points", "relative") else None
        rows.append(MetricRow(metric, mark(metric.estimate, axis), zero))
    return rows


def _guards(summary: Summary) -> list[DotPlot]:
    plots = []
    for unit in UNITS:
        tracks = [t for t in summary.guards if t.unit == unit]
        axis = axis_for(unit, [e for t in tracks for e in (t.before, t.after)])
        if tracks:
            plots.append(DotPlot(axis, [_guard_row(t, axis) for t in tracks]))
    return plots


def _guard_row(track: Track, axis: Axis) -> DotRow:
    shown = shown_as("change", track.unit)
    lanes = [
        Lane("before training", "before", mark(track.before, axis)),
        Lane("now", "guard", mark(track.after, axis)),
    ]
    clear = track.change.is_above or track.change.is_below
    noise = ", within the noise" if track.change.is_noise else ""
    return DotRow(track.name, lanes, estimate_text(track.change, shown) + noise, clear)


def _evidence(folder: RunFolder) -> list[EvidenceTable]:
    tables = []
    for method in folder.info.methods:
        rows = []
        for task in folder.evidence():
            shown = [e.values for e in task.methods if e.name == method.name]
            values: dict[str, Any] = dict(shown[0]) if shown else {}
            proof = values.pop(method.proof, None)
            asked = not method.is_neutral and task.index >= method.active_from
            active = isinstance(proof, (int, float)) and proof > 0
            state = "active" if active else "silent" if asked else "not asked"
            others = [(key, figure(value)) for key, value in values.items()]
            rows.append(EvidenceRow(task.task, state, figure(proof), others))
        settings = ", ".join(f"{k} {figure(v)}" for k, v in method.settings.items())
        since = method.active_from + 1
        tables.append(
            EvidenceTable(method.name, settings, method.proof, method.is_neutral, since, rows)
        )
    return tables


def _routes(folder: RunFolder) -> list[RouteRow]:
    """Where questions go whose task is not told, after the last task."""
    routes = folder.routes(folder.rows_done - 1)
    if routes is None:
        return []
    rows = []
    for task, chosen in routes.tasks.items():
        others = {name: n for name, n in chosen.items() if name != task}
        rows.append(RouteRow(task, routes.right(task), figure(others)))
    return rows


def figure(value: Any) -> str:
    """A number, list or mapping of evidence in few characters."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    if isinstance(value, Mapping):
        text = ", ".join(f"{key}: {figure(v)}" for key, v in value.items())
        return cut(text, 200) if text else "none"
    if isinstance(value, (list, tuple)):
        return cut(", ".join(figure(v) for v in value), 200) if value else "none"
    return cut(str(value), 200)


def _cost(folder: RunFolder) -> list[CostRow]:
    phases = folder.cost().phases
    total = sum(p.seconds for p in phases) or 1.0
    rows: list[CostRow] = []
    for name in dict.fromkeys([*PHASES, *(p.phase for p in phases)]):
        own = [p for p in phases if p.phase == name]
        if own:
            seconds = sum(p.seconds for p in own)
            start = rows[-1].start + rows[-1].percent if rows else 0.0
            tokens = sum(p.tokens for p in own)
            percent = 100 * seconds / total
            rows.append(CostRow(name, PHASES.get(name, name), seconds, percent, start, tokens))
    return rows


def _facts(provenance: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    for key, value in provenance.items():
        if isinstance(value, Mapping):
            facts += _facts(value, f"{prefix}{key} ")
        elif value not in ("", None, []):
            facts.append((f"{prefix}{key}".replace("_", " "), figure(value)))
    return facts


def quantity(value: float, unit: str) -> str:
    """`2.9 GB`, `3 min 12 s`, `19,200`: bytes, seconds or a count for people."""
    if unit == "bytes":
        steps = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")]
        size, name = next(((s, n) for s, n in steps if value >= s), (1.0, "bytes"))
        return f"{value / size:.{int(size > 1)}f}\u00a0{name}"
    if unit == "seconds":
        if value < 60:
            return f"{value:.1f}\u00a0s"
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        return (
            f"{hours}\u00a0h {minutes}\u00a0min"
            if hours
            else f"{minutes}\u00a0min {seconds}\u00a0s"
        )
    return f"{value:,.0f}"
