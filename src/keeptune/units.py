"""How a goodness is shown: shares and points, perplexities and their relative change."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from keeptune.intervals import Estimate
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

    floor = math.expm1(estimate.floor)
    if estimate.low is None or estimate.high is None:
        return Estimate(one(estimate.value), n=estimate.n, floor=floor)
    low, high = sorted((one(estimate.low), one(estimate.high)))
    return Estimate(one(estimate.value), low, high, estimate.n, floor)
