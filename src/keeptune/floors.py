"""The smallest difference that means something, from how much a run's numbers vary by chance."""

from __future__ import annotations

import math
import statistics

from keeptune.intervals import t975
from keeptune.records import Spread

Z975 = 1.96  # what a normal value exceeds in one case of 40


def floor(spread: Spread, *runs: int) -> float:
    """What a difference must reach, in either direction, to be more than chance in 19 of 20 cases.

        floor = √(Σ 1/k) · √((t · s)² + (1.96 · e)²)

    s is the standard deviation between seeds, with t of its degrees of freedom. It has the noise of
    scoring in it; without other seeds s is that of scoring again. e is what the choice of examples
    adds to one run when two have the same ones: their paired standard error divided by √2. Where no
    two runs are there to be paired it is that of a single score, as if each had its own examples.

    What single answers do by chance is in s and in e, so that the floor is a little high.

    Args:
        spread: What was measured.
        runs: How many runs are averaged, on each side that varies: `1, 1` for two single runs, `k,
            k` for the means of k seeds.

    Returns:
        In shares, or in the logarithm of a perplexity.
    """
    between, degrees = deviation(spread.seeds), len(spread.seeds) - 1
    if between is None:
        between, degrees = deviation(spread.again), len(spread.again) - 1
    chance = t975(degrees) * between if between is not None else 0.0
    examples = spread.examples if spread.paired is None else spread.paired / math.sqrt(2)
    return math.sqrt(sum(1 / k for k in runs)) * math.hypot(chance, Z975 * examples)


def deviation(values: list[float]) -> float | None:
    """The standard deviation; None of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None
