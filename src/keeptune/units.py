"""How a goodness is shown: shares and points, perplexities and their relative change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from keeptune.intervals import Estimate, over_seeds
from keeptune.records import Unit

Scale = Literal["level", "change", "loss", "ratio"]
Shown = Literal["share", "points", "perplexity", "relative"]
UNITS: tuple[Unit, Unit] = ("share", "perplexity")


def shown_as(scale: Scale, unit: Unit, *, difference: bool = False) -> Shown:
    """The unit in which a metric, or a difference of two runs in it, is shown."""
    if unit == "share":
        return "share" if scale in ("level", "ratio") and not difference else "points"
    return "perplexity" if scale == "level" and not difference else "relative"


def convert(estimate: Estimate, scale: Scale, shown: Shown) -> Estimate:
    """From goodness to the unit shown: exp(−g), or exp(−Δ) − 1, for perplexities."""
    if shown in ("share", "points") or estimate.value is None:
        return estimate
    sign = 1.0 if scale == "loss" else -1.0
    offset = 1.0 if shown == "relative" else 0.0

    def one(goodness: float) -> float:
        with np.errstate(over="ignore"):
            return float(np.exp(sign * goodness)) - offset

    # Noise of so much in goodness is more of a rise than of a fall.
    floor = abs(math.expm1(math.copysign(estimate.floor, one(estimate.value))))
    if estimate.low is None or estimate.high is None:
        return Estimate(one(estimate.value), n=estimate.n, floor=floor)
    low, high = sorted((one(estimate.low), one(estimate.high)))
    return Estimate(one(estimate.value), low, high, estimate.n, floor)


def mean_over_seeds(values: Sequence[float | None], shown: Shown) -> Estimate:
    """Mean over seeds of values as they are shown, with Student's t interval.

    Perplexities and their relative changes are averaged in their logarithms, as everywhere else: a
    geometric mean, whose interval stays where perplexities can be.

    Args:
        values: One a seed, in the unit of `shown`; None is left out.
        shown: The unit.
    """
    if shown in ("share", "points"):
        return over_seeds(values)
    offset = 1.0 if shown == "relative" else 0.0
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        found = over_seeds([None if v is None else float(np.log(v + offset)) for v in values])
        ends = [found.value, found.low, found.high]
        value, low, high = (None if e is None else float(np.exp(e)) - offset for e in ends)
    return replace(found, value=value, low=low, high=high)
