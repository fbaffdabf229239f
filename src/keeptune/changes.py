"""How far lines have changed: the same rows, scored before and now.

What is said about a line holds with the confidence asked for, by `intervals.paired_change`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from keeptune.folder import RunFolder
from keeptune.intervals import Array, Bounds, generator, paired_change
from keeptune.lines import Line, Probe
from keeptune.privacy import without_text
from keeptune.records import Example, Kind
from keeptune.scorers import cell_score
from keeptune.watchlog import Point

Scorer = Callable[[Probe], Sequence[Example]]
# Whether a line is below what is allowed, by its change at any confidence.
Judge = Callable[[float, Callable[[float], Bounds]], bool]


class Earlier:
    """What rows scored before, as a run folder has it; each file is read once.

    Args:
        folder: The run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._known: dict[tuple[int, Kind, int], dict[int, Example]] = {}

    def __call__(self, probe: Probe) -> list[Example]:
        """The results of a probe's rows, without their texts."""
        key = (probe.before, probe.kind, probe.index)
        if key not in self._known:
            cell = self._folder.cell(*key)
            assert cell is not None
            self._known[key] = {example.id: without_text(example) for example in cell.examples}
        return [self._known[key][i] for i in probe.ids]


def point(line: Line, score: Scorer, before: Scorer, confidence: float, is_below: Judge) -> Point:
    """Score a line's rows and compare them with their scores before.

    Args:
        line: What.
        score: Scores rows, with what the model is now.
        before: Knows what they scored before.
        confidence: Of each bound.
        is_below: Judges the change of a line that has an allowance.
    """
    now = [example for probe in line.probes for example in score(probe)]
    earlier = [example for probe in line.probes for example in before(probe)]
    found = change(now, earlier, line, confidence)
    return Point(
        name=line.name,
        role=line.role,
        unit=line.unit,
        n=len(now),
        score=cell_score(now, line.unit),
        change=found.value,
        low=found.low,
        high=found.high,
        error=found.error,
        allowed=line.allowed,
        is_below=line.allowed is not None
        and is_below(line.allowed, lambda sure: change(now, earlier, line, sure)),
    )


def change(
    now: Sequence[Example], before: Sequence[Example], line: Line, confidence: float
) -> Bounds:
    """The mean change for the better of the same examples, with a bound on each side."""
    sign = 1.0 if line.unit == "share" else -1.0
    pairs = zip(now, before, strict=True)
    changes: Array = np.array([sign * (a.score - b.score) for a, b in pairs], dtype=np.float64)
    weights: Array = np.array([example.weight for example in now], dtype=np.float64)
    # An answer can turn from right to wrong; a likelihood moves about as far as the others do.
    mean, spread = float(changes.mean()), float(changes.std())
    imagined = (1.0, -1.0) if line.unit == "share" else (mean + spread, mean - spread)
    rng = generator("paired", line.name, len(now))
    return paired_change(changes, weights, imagined, confidence, rng)
