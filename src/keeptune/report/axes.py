"""Scales, and marks with whiskers on them; positions are percentages of a figure's size."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from keeptune.intervals import Estimate
from keeptune.units import Shown
from keeptune.wording import estimate_text, number, unit_of

_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Axis:
    """A scale from values to percentages; logarithmic for perplexities.

    Attributes:
        low: Value at 0 %.
        high: Value at 100 %.
        shown: The unit.
        step: Between two ticks; not used for perplexities.
    """

    low: float
    high: float
    shown: Shown
    step: float = 0.25

    def at(self, value: float) -> float:
        """Percent along the axis, held inside it."""
        low, high = self.low, self.high
        if self.shown == "perplexity":
            low, high, value = (math.log(v) for v in (low, high, max(value, 1e-300)))
        share = float(value > 0) if math.isinf(value) else (value - low) / (high - low)
        return round(100 * min(max(share, 0.0), 1.0), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Percent and label of a few round values."""
        if self.shown == "perplexity":
            values = [self.low, math.sqrt(self.low * self.high), self.high]
        else:
            count = round((self.high - self.low) / self.step)
            values = [self.low + i * self.step for i in range(count + 1)]
        labels = [number(v, self.shown) for v in values]
        labels[-1] += unit_of(self.shown) if self.shown in ("share", "relative") else ""
        return [(self.at(v), label) for v, label in zip(values, labels, strict=True)]


def axis_for(shown: Shown, estimates: Iterable[Estimate | None]) -> Axis:
    """The axis that holds all estimates: 0 to 1 for shares, even about 0 for changes."""
    estimates = list(estimates)
    ends = _ends(estimates)
    if shown == "share":
        # What is kept of a guard can be more than all; a score's interval cannot.
        most = max((e.value for e in estimates if e and e.value is not None), default=0.0)
        every = [x for x in ends if x > 1.0] if most > 1.0 else []
        return Axis(0.0, max(math.ceil(4 * x) / 4 for x in (1.0, *every)), shown)
    if shown == "perplexity":
        low, high = (min(ends), max(ends)) if ends else (1.0, 10.0)
        return Axis(low / 1.08, high * 1.08, shown)
    most = max((abs(end) for end in ends), default=0.0)
    step = next((s for s in _STEPS if 2 * s >= most), math.ceil(most / 2))
    return Axis(-2 * step, 2 * step, shown, step)


def fitted_axis(shown: Shown, estimates: Iterable[Estimate | None], *hold: float) -> Axis:
    """The narrowest round axis that holds all estimates and the values `hold`."""
    ends = [*_ends(estimates), *hold]
    low, high = min(ends), max(ends)
    step = next((s for s in _STEPS if high - low <= 6 * s), math.ceil((high - low) / 6))
    bottom, top = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(bottom * step, max(top, bottom + 1) * step, shown, step)


def _ends(estimates: Iterable[Estimate | None]) -> list[float]:
    every = [(e.value, e.low, e.high) for e in estimates if e is not None]
    return [x for ends in every for x in ends if x is not None and np.isfinite(x)]


@dataclass(frozen=True)
class Mark:
    """A value and its interval on an axis, in percent, with its text."""

    at: float
    low: float
    high: float
    text: str


def mark(estimate: Estimate | None, axis: Axis) -> Mark | None:
    """Where an estimate stands; None where it has no value."""
    if estimate is None or estimate.value is None:
        return None
    at = axis.at(estimate.value)
    low = at if estimate.low is None else axis.at(estimate.low)
    high = at if estimate.high is None else axis.at(estimate.high)
    return Mark(at, low, high, estimate_text(estimate, axis.shown))


@dataclass(frozen=True)
class Lane:
    """One mark of a row, with the words and the style (a CSS class) that tell it from others."""

    words: str
    style: str
    mark: Mark | None


@dataclass(frozen=True)
class DotRow:
    """One task or guard of a dot plot; `note` stands at its end, in bold when `is_clear`."""

    name: str
    lanes: list[Lane]
    note: str
    is_clear: bool = False


@dataclass(frozen=True)
class DotPlot:
    """Rows of marks on one axis."""

    axis: Axis
    rows: list[DotRow]

    @property
    def key(self) -> list[Lane]:
        """The lanes of the first row, for the legend."""
        return self.rows[0].lanes


@dataclass(frozen=True)
class Spot:
    """One run of a scatter plot, with a whisker in each direction.

    Attributes:
        label: The run.
        style: Its CSS class.
        x: Along.
        y: Up.
        size: What its area stands for.
        radius: In pixels.
        shift: Pixels its label is moved so that no two overlap.
        is_front: Whether no other run beats it.
    """

    label: str
    style: str
    x: Mark
    y: Mark
    size: float
    radius: float
    shift: int
    is_front: bool


@dataclass(frozen=True)
class Scatter:
    """Runs by two numbers.

    Attributes:
        x_axis: Along.
        y_axis: Up.
        x_title: What goes along.
        y_title: What goes up.
        spots: The runs.
        front: Corners of the line that no run lies beyond, as SVG points from the top left.
    """

    x_axis: Axis
    y_axis: Axis
    x_title: str
    y_title: str
    spots: list[Spot]
    front: str


LARGEST, SMALLEST = 15.0, 4.0


def scatter(
    runs: Sequence[tuple[str, str, Estimate, Estimate, float]],
    x: tuple[Shown, str],
    y: tuple[Shown, str],
    front: Collection[int] = (),
) -> Scatter:
    """Place runs by two numbers.

    Args:
        runs: Label, style, what goes along and up, and what the area stands for.
        x: Unit and title of what goes along; the axis holds 0.
        y: Unit and title of what goes up; the axis holds "nothing lost".
        front: Positions of the runs that no other one beats.
    """
    x_axis = fitted_axis(x[0], [run[2] for run in runs], 0.0)
    y_axis = fitted_axis(y[0], [run[3] for run in runs], 1.0 if y[0] == "share" else 0.0)
    most = max(run[4] for run in runs) or 1.0
    spots: list[Spot] = []
    for position, (label, style, along, up, size) in enumerate(runs):
        at_x, at_y = mark(along, x_axis), mark(up, y_axis)
        if at_x and at_y:
            near = [s for s in spots if abs(s.y.at - at_y.at) < 7 and abs(s.x.at - at_x.at) < 35]
            radius = round(max(LARGEST * math.sqrt(size / most), SMALLEST), 1)
            first = position in front
            spots.append(Spot(label, style, at_x, at_y, size, radius, 18 * len(near), first))
    return Scatter(x_axis, y_axis, x[1], y[1], spots, _stairs(spots))


def _stairs(spots: Sequence[Spot]) -> str:
    corners = sorted({(s.x.at, s.y.at) for s in spots if s.is_front})
    if not corners:
        return ""
    points = [(0.0, corners[0][1])]
    for (x, y), after in zip(corners, [*corners[1:], (0.0, 0.0)], strict=True):
        points += [(x, y), (x, after[1])]
    return " ".join(f"{x},{round(100 - y, 2)}" for x, y in points)
