"""What trials learned and kept, and which of them are the best bargains between the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from keeptune.ranking import front
from keeptune.results import Results


@dataclass(frozen=True)
class Trial:
    """One run of the search; all scores on held-out rows.

    Attributes:
        number: From 0; the first has the recipe's own settings, where they lie in the ranges.
        settings: What was tried, by its key.
        learned: What training added to each task, on average, higher is better.
        kept: How guards and earlier tasks changed since, on average, higher is better.
        folder: The run's folder.
        said: Why it failed; "" where it did not.
        is_front: Whether no other trial learned more and kept as much, or the other way round.
        is_knee: Whether it is the one to be chosen.
    """

    number: int
    settings: dict[str, float]
    learned: float | None
    kept: float | None
    folder: str
    said: str
    is_front: bool = False
    is_knee: bool = False


def objectives(results: Results) -> tuple[float, float]:
    """What a run learned and kept, higher is better.

    Returns:
        The mean of what training added to each task; and the mean of how each guard changed since
        the start, and each earlier task since it was learned. Shares count as they are,
        perplexities by minus their logarithm.
    """
    tasks = [column.goodness for column in results.tasks]
    learned = [scores[i + 1] - scores[0] for i, scores in enumerate(tasks)]
    kept = [scores[-1] - scores[i + 1] for i, scores in enumerate(tasks[:-1])]
    kept += [column.goodness[-1] - column.goodness[0] for column in results.kept]
    return float(np.mean(learned)), float(np.mean(kept))


def chosen(trials: Sequence[Trial]) -> list[Trial]:
    """The trials, with those on the front and the one at its knee marked."""
    known = [(t.number, t.learned, t.kept) for t in trials if not t.said]
    points = [(learned or 0.0, kept or 0.0) for _, learned, kept in known]
    best = front(points)
    if not best:
        return list(trials)
    at = known[best[knee([points[i] for i in best])]][0]
    numbers = {known[i][0] for i in best}
    return [replace(t, is_front=t.number in numbers, is_knee=t.number == at) for t in trials]


def knee(points: Sequence[tuple[float, float]]) -> int:
    """Position of the point of a front that is furthest beyond the line between its two ends.

    Both directions are counted as shares of the front's width. Where no point is beyond the line,
    it is the end that keeps most.

    Source: Branke et al. 2004, Finding knees in multi-objective optimization; the chord is that of
        Das 1999, On characterizing the "knee" of the Pareto curve.
    """
    x, y = np.array(points, dtype=np.float64).T
    width, height = (float(np.ptp(side)) or 1.0 for side in (x, y))
    beyond = (x - x.min()) / width + (y - y.min()) / height
    # Rounding must not decide between the ends.
    furthest = np.flatnonzero(beyond > beyond.max() - 1e-9)
    return int(furthest[np.argmax(y[furthest])])
