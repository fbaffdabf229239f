"""What the command line prints: methods and their cards, and a run's scores in one small table."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from keeptune.bargains import Trial
    from keeptune.checks import Finding
    from keeptune.comparison import Group as Comparable
    from keeptune.forgetting import Forgotten
    from keeptune.intervals import Estimate
    from keeptune.method import Method
    from keeptune.metrics import Summary
    from keeptune.records import Noise
    from keeptune.watchlog import Frontier

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥"}


def methods_table(classes: Sequence[type[Method]]) -> Table:
    """One line per method: its name, what it does and when to use it."""
    from keeptune.cards import card

    table = _table("name", "what it does", "use when")
    for cls in classes:
        shown = card(cls)
        table.add_row(*map(Text, (cls.name(), shown.title, shown.fields.get("Use when", ""))))
    return table


def method_card(cls: type[Method]) -> RenderableType:
    """A method's card and its settings, for a terminal."""
    from keeptune.cards import card

    shown = card(cls)
    parts: list[RenderableType] = [Text(f"{cls.name()}: {shown.title}", style="bold"), Text()]
    for key, value in shown.fields.items():
        parts += [Text(key, style="bold"), Padding(Text(value), (0, 0, 0, 2))]
    parts += [Text("Export", style="bold"), Padding(Text(export_text(cls)), (0, 0, 0, 2))]
    settings = method_settings(cls)
    if not settings:
        return Group(*parts, Text(), Text("It has no settings."))
    table = _table("setting", "default", "allowed", "meaning")
    for row in settings:
        table.add_row(*map(Text, row))
    return Group(*parts, Text(), table)


def export_text(cls: type[Method]) -> str:
    """What `keeptune export` can write of it."""
    return {
        "one model": "one model for all tasks.",
        "per task": "one model or adapter for each task.",
        "keeptune": "none: its answers need keeptune beside the model.",
    }[cls.served]


def method_settings(cls: type[Method]) -> list[tuple[str, str, str, str]]:
    """A method's settings as (name, default, allowed values, meaning)."""
    rows = []
    for name, field in cls.model_fields.items():
        allowed = ", ".join([_type_name(field.annotation), *_bounds(field.metadata)])
        default = (
            "must be given"
            if field.is_required()
            else _in_yaml(field.get_default(call_default_factory=True))
        )
        rows.append((name, default, allowed, field.description or ""))
    return rows


def methods_markdown(classes: Sequence[type[Method]]) -> str:
    """Every method's card as Markdown, under a table of all, for the reference pages."""
    from keeptune.cards import card

    cards = [(cls, card(cls)) for cls in classes]
    lines = ["| name | what it does | use when |", "|---|---|---|"]
    for cls, shown in cards:
        cells = (f"[`{cls.name()}`](#{cls.name()})", shown.title, shown.fields.get("Use when", ""))
        lines.append(_markdown_row(cells))
    lines = lines if len(cards) > 1 else []
    for cls, shown in cards:
        lines += ["", f"## {cls.name()}", "", shown.title, ""]
        lines += [f"- **{key}**: {value}" for key, value in shown.fields.items()]
        lines.append(f"- **Export**: {export_text(cls)}")
        settings = method_settings(cls)
        if settings:
            lines += ["", "| setting | default | allowed | meaning |", "|---|---|---|---|"]
            lines += [_markdown_row((f"`{row[0]}`", f"`{row[1]}`", *row[2:])) for row in settings]
    return "\n".join(lines).strip() + "\n"


def scores_table(summary: Summary) -> Table:
    """Scores of tasks and guards before, when learned, and now, with 95 % intervals."""
    table = _table("tasks", "before", "learned", "now", "change since")
    for column in table.columns[1:]:
        column.justify = "right"
    for track in summary.tasks:
        cells = [score_text(e, track.unit) for e in (track.before, track.learned, track.after)]
        table.add_row(Text(track.name), *cells, change_text(track.change, track.unit))
    if summary.guards:
        table.add_row(Text("guards", style="bold"))
    for track in summary.guards:
        ends = [score_text(e, track.unit) for e in (track.before, track.after)]
        change = change_text(track.change, track.unit)
        table.add_row(Text(track.name), ends[0], "", ends[1], change)
    table.caption = "95 % intervals in brackets; plain numbers are perplexities, lower is better"
    return table


def comparison_table(groups: Sequence[Comparable]) -> Table:
    """One line a strategy: what it learned and kept, with 95 % intervals, and what it took."""
    from keeptune.progress import duration

    shown = [key for key in _COMPARED if any(_known(group, key) for group in groups)]
    table = _table("strategy", "runs", *(_COMPARED[key] for key in shown), "training")
    for column in table.columns[1:]:
        column.justify = "right"
    for group in groups:
        cells = [_metric_text(group, key) for key in shown]
        runs = str(len(group.results))
        table.add_row(Text(group.label), runs, *cells, duration(group.training_seconds))
    table.caption = "95 % intervals in brackets"
    return table


_COMPARED = {
    "learning_gain": "learned",
    "learning_gain_perplexity": "perplexity, learned",
    "guard_kept": "guards kept",
    "guard_change_perplexity": "perplexity of guards",
    "backward_transfer": "earlier tasks",
    "backward_transfer_perplexity": "perplexity, earlier tasks",
}


def _known(group: Comparable, key: str) -> bool:
    metric = group.metric(key)
    return metric is not None and metric.estimate.value is not None


def _metric_text(group: Comparable, key: str) -> str:
    metric = group.metric(key)
    if metric is None:
        return "–"
    if metric.shown == "share":
        return score_text(metric.estimate, "share")
    return change_text(metric.estimate, "share" if metric.shown == "points" else "perplexity")


def findings_text(findings: Sequence[Finding]) -> Text:
    """What the checks found, a line each: errors red, warnings yellow."""
    styles = {"error": "bold red", "warning": "yellow", "note": "dim"}
    lines = [
        Text(f"{f.code} {f.severity}: {f.message}", style=styles[f.severity]) for f in findings
    ]
    return Text("\n").join(lines)


def score_text(estimate: Estimate | None, unit: str) -> str:
    """`71 % (65–77)`, or `12.3 (11.9–12.8)` for a perplexity."""
    if estimate is None or estimate.value is None:
        return "–"
    form = _percent if unit == "share" else _perplexity
    sign = " %" if unit == "share" else ""
    return f"{form(estimate.value)}{sign}{_ends(estimate, form, '–')}"


def change_text(estimate: Estimate, unit: str) -> str:
    """`-12 pts (-18 to -6)`, or `+8 % (+5 to +11)` for a perplexity."""
    if estimate.value is None:
        return "–"
    sign = "pts" if unit == "share" else "%"
    noise = ", within the noise" if estimate.is_noise else ""
    return f"{_signed(estimate.value)} {sign}{_ends(estimate, _signed, ' to ')}{noise}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"


def _signed(value: float) -> str:
    shown = f"{100 * value:+.0f}"
    return "0" if float(shown) == 0 else shown


def _perplexity(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _ends(estimate: Estimate, form: Callable[[float], str], between: str) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" ({form(estimate.low)}{between}{form(estimate.high)})"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def forgotten_text(done: Forgotten, *, dry_run: bool) -> str:
    """What `keeptune forget` removed, or would, and what it cannot."""
    would = "would be " if dry_run else ""
    lines = [
        f"{place}: {removed} of {rows} rows {would}removed"
        for place, (removed, rows) in done.rows.items()
    ]
    lines += [
        f"{file}: texts of {count} examples {would}replaced"
        for file, count in done.examples.items()
    ]
    if done.begins_again:
        lines.append("The task that is not finished begins again with --resume.")
    if done.nothing:
        lines.append("No row and no example is meant.")
    elif not dry_run:
        lines.append(
            "The weights still hold what they learned of these rows, and so does what methods "
            "computed of them: only training again without them changes that. Your data files are "
            "as they were."
        )
    lines += [f"Left in {file}, which keeptune does not change." for file in done.left]
    return "\n".join(lines)


def tuned_table(trials: Sequence[Trial]) -> Table:
    """The trials that no other beats, and the recipe's own settings, in the order of learning."""
    shown = sorted(
        (t for t in trials if t.is_front or (t.number == 0 and not t.said)),
        key=lambda trial: trial.learned or 0.0,
    )
    table = _table("trial", *trials[0].settings, "learned", "kept", "")
    for trial in shown:
        settings = [f"{value:g}" for value in trial.settings.values()]
        scores = [f"{100 * (score or 0.0):+.1f}" for score in (trial.learned, trial.kept)]
        mark = "knee" if trial.is_knee else "front" if trial.is_front else "beaten"
        table.add_row(str(trial.number), *settings, *scores, mark)
    table.caption = "changes of scores in points (perplexities: of their logarithm, in hundredths)"
    return table


def noise_table(noise: Noise) -> RenderableType:
    """How much a run's numbers vary by chance, and the smallest differences that mean something."""
    from keeptune.report.noise import noise_view

    view = noise_view(noise)
    parts: list[RenderableType] = []
    for kind, words in (("task", "tasks"), ("guard", "guards"), ("metric", "averages")):
        rows = [(row.name, *row.cells) for row in view.rows if row.kind == kind and row.is_main]
        if rows:
            table = _table(words, *view.columns)
            for column in table.columns[1:]:
                column.justify = "right"
            for row in rows:
                table.add_row(*map(Text, row))
            parts += [table, Text()]
    return Group(*parts, Text(view.said))


def frontier_table(frontier: Frontier) -> Table:
    """What the steps that were tried between two models changed, each with its bounds."""
    from keeptune.report.steered import tried_table

    names, rows = tried_table(frontier)
    table = _table("share", "rows for", *names, "inside")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _in_yaml(value: Any) -> str:
    """A default as one writes it in a recipe."""
    return value if isinstance(value, str) else json.dumps(value)


def _bounds(metadata: Sequence[Any]) -> list[str]:
    """What a number or a length must keep to."""
    return [
        f"{sign} {getattr(mark, key)}"
        for mark in metadata
        for key, sign in _BOUNDS.items()
        if getattr(mark, key, None) is not None
    ]


def _type_name(annotation: Any) -> str:
    """A type in plain words: `whole number`, `one of a, b`."""
    words = {float: "number", int: "whole number", bool: "true or false", str: "text"}
    if annotation in words:
        return words[annotation]
    parts, origin = typing.get_args(annotation), typing.get_origin(annotation)
    if origin is typing.Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(parts)
    if origin in (typing.Union, types.UnionType):
        rest = [_type_name(part) for part in parts if part is not type(None)]
        return " or ".join(rest + ["nothing"] * (type(None) in parts))
    if origin is typing.Annotated:
        marks = [mark for field in parts[1:] for mark in field.metadata]
        return ", ".join([_type_name(parts[0]), *_bounds(marks)])
    if origin is dict:
        return f"by {_type_name(parts[0])}: {_type_name(parts[1])}"
    if origin in (list, tuple):
        return f"list of {_type_name(parts[0])}"
    return str(annotation).replace("typing.", "")
