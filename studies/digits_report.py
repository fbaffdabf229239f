"""The tables and curves of the digits study, from the lines of its stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from digits import FAMILY, METHODS, SHARES
from digits_model import scenarios
from keeptune import formulas
from keeptune.intervals import over_seeds
from lines import Run, Runs, fill, paired, points

ESTIMATORS = ["ewc", "ewc sampled", "ewc exact", "ewc signs", "ewc batched"]
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377"]


# -- reading --------------------------------------------------------------------------------------


def select(runs: Runs, scenario: str, label: str, pick: str) -> Runs:
    """The runs of one cell of a table that did not fail, in the order of their seeds.

    Args:
        runs: Of one stage.
        scenario: "split/task" and so on.
        label: A key of `METHODS`.
        pick: "" for the given strength or none, "auto", or a precision.
    """
    found = [
        run
        for run in runs
        if (run["scenario"], run["method"], pick_of(run)) == (scenario, label, pick) and run["R"]
    ]
    return sorted(found, key=lambda run: int(run["seed"]))


def pick_of(run: Run) -> str:
    """What sets a run apart from others of its method: "", "auto" or a precision."""
    settings = run["settings"]
    if settings.get("strength") == "auto":
        return "auto"
    return str(settings.get("precision", ""))


def average(run: Run) -> float:
    """Mean accuracy over all tasks at the end."""
    return float(formulas.average_accuracy(np.array(run["R"])))


def by_strength(runs: Runs, scenario: str, label: str) -> dict[float, list[float]]:
    """Accuracies of a swept method: strength to one value a seed."""
    found: dict[float, list[float]] = {}
    for run in select(runs, scenario, label, ""):
        if isinstance(strength := run["settings"].get("strength"), float):
            found.setdefault(strength, []).append(average(run))
    return dict(sorted(found.items()))


def given(runs: Runs, scenario: str, label: str) -> float | None:
    """The strength that the final runs of a method were given."""
    found = select(runs, scenario, label, "")
    return found[0]["settings"].get("strength") if found else None


# -- tables ---------------------------------------------------------------------------------------


def table(title: str, rows: Iterator[tuple[str, list[str]]]) -> str:
    """A markdown table with a column for each scenario; rows without any cell are left out."""
    names = scenarios()
    lines = [f"| {title} | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows if any(cells)]
    return "\n".join(lines)


def rows_of(picks: Sequence[str], cell: Callable[[str, str, str], str]) -> Any:
    """A row for each method and pick, a cell for each scenario."""
    for label in METHODS:
        for pick in picks:
            cells = [cell(scenario, label, pick) for scenario in scenarios()]
            yield label + (f", {pick}" if pick else ""), cells


def power(strength: float | None) -> str:
    """A strength as a power of ten."""
    if strength is None:
        return ""
    exponent = math.log10(strength)
    shown = f"{exponent:.0f}" if abs(exponent - round(exponent)) < 1e-6 else f"{exponent:.1f}"
    return f"10<sup>{shown}</sup>"


def accuracy_table(final: Runs) -> str:
    """Average accuracy on the test rows after all tasks."""

    def cell(scenario: str, label: str, pick: str) -> str:
        return points(over_seeds([average(r) for r in select(final, scenario, label, pick)]))

    return table("accuracy, %", rows_of(["", "auto"], cell))


def gain_table(final: Runs) -> str:
    """The same against plain training from the same seeds."""

    def cell(scenario: str, label: str, pick: str) -> str:
        if label == "plain":
            return ""
        plain = select(final, scenario, "plain", "")
        return points(paired(select(final, scenario, label, pick), plain, average), signed=True)

    return table("points above plain", rows_of(["", "auto"], cell))


def trade_table(final: Runs) -> str:
    """What was learned, and what of it was forgotten."""

    def cell(scenario: str, label: str, pick: str) -> str:
        found = [np.array(run["R"]) for run in select(final, scenario, label, pick)]
        if not found:
            return ""
        learned = fmean(float(formulas.learning_accuracy(R)) for R in found)
        forgot = fmean(float(formulas.forgetting(R)) for R in found)
        return f"{100 * learned:.1f} / {100 * forgot:.1f}"

    return table("learned / forgotten, %", rows_of(["", "auto"], cell))


def shift(curve: dict[float, list[float]], other: dict[float, list[float]]) -> float | None:
    """By how much strengths must be larger on `curve` for it to lie on `other`.

    The factor with the least mean squared distance between the means, in tenths of a decade. It
    uses the whole curves, where the best strengths of two flat tops say little.
    """
    if len(curve) < 3 or len(other) < 3:
        return None
    (x, y), (a, b) = (
        (np.log10(list(c)), np.array([fmean(v) for v in c.values()])) for c in (curve, other)
    )
    distances = {}
    for decades in np.arange(-20, 61) / 10:
        inside = (x - decades >= a[0]) & (x - decades <= a[-1])
        if inside.sum() * 2 > len(x):
            gap = y[inside] - np.interp(x[inside] - decades, a, b)
            distances[float(decades)] = float(np.square(gap).mean())
    return math.pow(10.0, min(distances, key=lambda d: (distances[d], abs(d))))


def share_table(shared: Runs) -> str:
    """What was learned, and what is left at the end, by share: validation rows."""

    def cell(name: str, label: str, share: float | None) -> str:
        runs = select(shared, name, label, "" if share is None else "auto")
        found = [np.array(run["R"]) for run in runs if run["settings"].get("share") == share]
        measures = (formulas.learning_accuracy, formulas.average_accuracy)
        return " / ".join(
            f"{100 * fmean(float(measure(R)) for R in found):.1f}" for measure in measures if found
        )

    names = [name for name in scenarios() if name.endswith("/domain")]
    lines = [f"| learned / at the end, % | share | {' | '.join(names)} |", "|---|---:|---:|---:|"]
    for label in ["plain", *FAMILY]:
        for share in SHARES if label in FAMILY else [None]:
            cells = [cell(name, label, share) for name in names]
            lines.append(f"| {label} | {share or ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def strength_table(swept: Runs, final: Runs) -> str:
    """The strengths that the sweep chose, and how much larger `batched` needs them.

    A star marks the end of a grid, beyond which a better one may lie.
    """

    def cell(scenario: str, label: str, pick: str) -> str:
        strength, grid = given(final, scenario, label), METHODS[label].strengths
        return power(strength) + (" \\*" if strength in grid[:1] + grid[-1:] else "")

    batched, empirical = (
        [by_strength(swept, scenario, label) for scenario in scenarios()]
        for label in ("ewc batched", "ewc")
    )
    shifts = " | ".join(power(shift(a, b)) for a, b in zip(batched, empirical, strict=True))
    return f"{table('chosen strength', rows_of([''], cell))}\n| batched over empirical | {shifts} |"


def auto_table(swept: Runs) -> str:
    """Where `strength: auto` lands: its strength, and what it costs against the best one."""

    def cell(scenario: str, label: str, pick: str) -> str:
        runs, curve = select(swept, scenario, label, "auto"), by_strength(swept, scenario, label)
        found = [run["evidence"][-1].get("strength") for run in runs]
        if not curve or not found or not all(isinstance(s, int | float) and s > 0 for s in found):
            return ""
        mean = 10 ** fmean(math.log10(s) for s in found)
        best = max(curve, key=lambda strength: fmean(curve[strength]))
        lost = fmean(average(run) for run in runs) - fmean(curve[best])
        return f"{power(mean)}, best {power(best)}: {100 * lost:+.1f}"

    return table("auto took, swept best: points", rows_of([""], cell))


def precision_table(final: Runs) -> str:
    """What smaller forms of the stored state change on the final row of R."""
    precisions = sorted({p for entry in METHODS.values() for p in entry.precisions})

    def cell(scenario: str, label: str, pick: str) -> str:
        runs, exact = select(final, scenario, label, pick), select(final, scenario, label, "")
        rows = {run["seed"]: np.array(run["R"][-1]) for run in exact}
        gaps = [np.abs(np.array(r["R"][-1]) - rows[r["seed"]]) for r in runs if r["seed"] in rows]
        if not gaps:
            return ""
        worst = 100 * max(float(gap.max()) for gap in gaps)
        return f"{100 * (paired(runs, exact, average).value or 0.0):+.2f} (≤ {worst:.1f})"

    return table("mean change in points (largest of a task)", rows_of(precisions, cell))


def cost_table(final: Runs) -> str:
    """Median CPU seconds of learning all tasks."""

    def cell(scenario: str, label: str, pick: str) -> str:
        seconds = [run["seconds"] for run in select(final, scenario, label, pick)]
        return f"{median(seconds):.1f}" if seconds else ""

    return table("seconds a run", rows_of([""], cell))


# -- curves ---------------------------------------------------------------------------------------

PANEL_W, PANEL_H, LEFT, TOP, GAP = 250, 150, 40, 26, 44
FLOOR = 0.4  # the share at the bottom of a panel; what is below is drawn there


def curves(swept: Runs, labels: list[str]) -> str:
    """An SVG: accuracy over strength, a panel for each scenario.

    Lines are means over seeds, bands their range, diamonds `strength: auto`, the dashed line plain.
    """
    exponents = [METHODS[label].exponents or (0, 1) for label in labels]
    low, high = min(e[0] for e in exponents), max(e[1] for e in exponents)
    parts = [
        _panel(swept, scenario, labels, (low, high), index)
        for index, scenario in enumerate(scenarios())
    ]
    width, height = 3 * (PANEL_W + GAP) + LEFT, 2 * (PANEL_H + GAP + TOP) + 24
    legend = "".join(
        f'<rect x="{LEFT + 150 * i}" y="{height - 16}" width="14" height="4" fill="{colour}"/>'
        f'<text x="{LEFT + 20 + 150 * i}" y="{height - 10}">{label}</text>'
        for i, (label, colour) in enumerate(zip(labels, COLOURS, strict=False))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">'
        f'<rect width="{width}" height="{height}" fill="#fff"/>{"".join(parts)}{legend}</svg>\n'
    )


def _panel(swept: Runs, scenario: str, labels: list[str], ends: tuple[int, int], at: int) -> str:
    left, top = LEFT + at % 3 * (PANEL_W + GAP), TOP + at // 3 * (PANEL_H + GAP + TOP)
    low, high = ends

    def x(strength: float) -> float:
        return left + PANEL_W * (math.log10(strength) - low) / (high - low)

    def y(share: float) -> float:
        return top + PANEL_H * min((1 - share) / (1 - FLOOR), 1)

    parts = [f'<text x="{left}" y="{top - 8}" font-weight="bold">{scenario}</text>']
    parts += [
        f'<path d="M{left} {y(share):.1f}h{PANEL_W}" stroke="#ddd"/>'
        f'<text x="{left - 6}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>'
        for share in (FLOOR, (FLOOR + 1) / 2, 1.0)
    ]
    parts += [
        f'<text x="{x(10.0**e):.1f}" y="{top + PANEL_H + 16}" text-anchor="middle">10'
        f'<tspan dy="-4" font-size="8">{e}</tspan></text>'
        for e in range(low, high + 1, 3)
    ]
    if plain := [average(run) for run in select(swept, scenario, "plain", "")]:
        parts.append(
            f'<path d="M{left} {y(fmean(plain)):.1f}h{PANEL_W}" stroke="#555" '
            'stroke-dasharray="4 3"/>'
        )
    for label, colour in zip(labels, COLOURS, strict=False):
        parts.append(_curve(by_strength(swept, scenario, label), x, y, colour))
        parts += [
            f'<path d="M{x(strength):.1f} {y(average(run)) - 4:.1f}l4 4l-4 4l-4 -4z" '
            f'fill="{colour}"/>'
            for run in select(swept, scenario, label, "auto")
            if 10.0**low <= (strength := run["evidence"][-1].get("strength") or 0) <= 10.0**high
        ]
    return "".join(parts)


def _curve(
    curve: dict[float, list[float]],
    x: Callable[[float], float],
    y: Callable[[float], float],
    colour: str,
) -> str:
    band = [f"{x(s):.1f},{y(max(v)):.1f}" for s, v in curve.items()]
    band += [f"{x(s):.1f},{y(min(v)):.1f}" for s, v in reversed(curve.items())]
    lines = [
        f"M{x(a):.1f} {y(fmean(curve[a])):.1f}L{x(b):.1f} {y(fmean(curve[b])):.1f}"
        for a, b in pairwise(curve)
    ]
    return (
        f'<polygon points="{" ".join(band)}" fill="{colour}" opacity="0.12"/>'
        f'<path d="{"".join(lines)}" stroke="{colour}" stroke-width="1.5" fill="none"/>'
    )


# -- the page -------------------------------------------------------------------------------------


def write(shared: Runs, swept: Runs, final: Runs, out: Path) -> None:
    """Put the tables between the page's markers, and the curves beside it.

    Everything outside of the markers stays as it is.

    Args:
        shared: Lines of the stage share.
        swept: Lines of the stage sweep.
        final: Lines of the stage final.
        out: A markdown file with `<!-- begin NAME -->` and `<!-- end NAME -->` around each table.
    """
    tables = {
        "share": share_table(shared),
        "accuracy": accuracy_table(final),
        "gain": gain_table(final),
        "trade": trade_table(final),
        "strength": strength_table(swept, final),
        "auto": auto_table(swept),
        "precision": precision_table(final),
        "cost": cost_table(final),
    }
    page = out.read_text("utf-8")
    for name, text in tables.items():
        page = fill(page, name, text)
    out.write_text(page, "utf-8")
    for name, labels in (("methods", FAMILY), ("estimators", ESTIMATORS)):
        out.with_name(f"digits-{name}.svg").write_text(curves(swept, labels), "utf-8")
