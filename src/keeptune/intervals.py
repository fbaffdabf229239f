"""95 % intervals: paired bootstrap over examples, Student's t over seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DRAWS = 2000
FEWEST_EQUAL = 4  # equal values of so few seeds happen by chance too often
# Student's t at 0.975 for 1 to 30 degrees of freedom; beyond 30 the last one is a little wide.
_T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
# Sums of the same scores in another order differ by about this much.
_ROUNDING = 1e-9
_TAIL = 20  # draws beyond a bound, at least
# Counts of one draw take 8 bytes an example; this keeps a block of draws under 32 MB.
_BLOCK = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: None where it is not defined.
        low: Lower end; None where no interval is known.
        high: Upper end; None where no interval is known.
        n: What was averaged over or resampled: examples, tasks, guards or seeds.
        floor: A change smaller than this comes about by chance, as `keeptune noise` measured; 0
            where it did not.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    floor: float = 0.0

    @property
    def is_above(self) -> bool:
        """Whether the whole interval lies above 0, and the value above the floor."""
        return self._leaves_0_out(1.0) and not self.is_noise

    @property
    def is_below(self) -> bool:
        """Whether the whole interval lies below 0, and the value below the floor."""
        return self._leaves_0_out(-1.0) and not self.is_noise

    @property
    def is_noise(self) -> bool:
        """Whether a change that its interval calls one is smaller than the floor."""
        is_clear = self._leaves_0_out(1.0) or self._leaves_0_out(-1.0)
        return is_clear and abs(self.value or 0.0) < self.floor

    def _leaves_0_out(self, side: float) -> bool:
        nearest = self.low if side > 0 else self.high
        return nearest is not None and side * nearest > _ROUNDING

    def shifted(self, by: float) -> Estimate:
        """The same with `by` added to the value and both ends."""
        value, low, high = (
            None if x is None else x + by for x in (self.value, self.low, self.high)
        )
        return replace(self, value=value, low=low, high=high)


def generator(*words: object) -> np.random.Generator:
    """A random generator that depends on the words alone."""
    return np.random.default_rng(list(hashlib.sha256(repr(words).encode()).digest()))


def resample(
    scores: Array,
    weights: Array,
    rng: np.random.Generator,
    draws: int = DRAWS,
    times: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """Bootstrap the weighted means of several rows, the same examples in each row of a draw.

    Args:
        scores: [rows, n]; what is of weight 0 may be NaN.
        weights: [rows, n], not negative.
        rng: Two calls with generators of one seed and one n draw the same examples, which makes
            differences between runs paired.
        draws: How many.
        times: [n], how often each example is there; default: once.

    Returns:
        Means, [draws, rows]; NaN in a row without weight.

    Source: Efron and Tibshirani 1993, An introduction to the bootstrap, chapter 13.
    """
    n = scores.shape[1]
    times = np.ones(n, dtype=np.int64) if times is None else times
    weighted = np.where(weights > 0, weights * scores, 0.0)
    means = np.full((draws, scores.shape[0]), np.nan)
    block = max(1, _BLOCK // max(n, 1))
    for start in range(0, draws if n else 0, block):
        size = min(block, draws - start)
        counts = rng.multinomial(times.sum(), times / times.sum(), size=size).astype(np.float64)
        total = counts @ weights.T
        np.divide(counts @ weighted.T, total, out=means[start : start + size], where=total > 0)
    return means


def binomial(scores: Array, n: int, rng: np.random.Generator, draws: int = DRAWS) -> Array:
    """Draws for shares whose single examples are not known; rows are independent.

    Wider than a paired bootstrap where rows are compared, never narrower.

    Args:
        scores: Shares, [rows]; NaN stays NaN.
        n: Examples behind each share.
        rng: Where the randomness comes from.
        draws: How many.

    Returns:
        Shares, [draws, rows].
    """
    known = ~np.isnan(scores)
    drawn = np.full((draws, len(scores)), np.nan)
    shares = np.clip(scores[known], 0.0, 1.0)
    drawn[:, known] = rng.binomial(n, shares, size=(draws, len(shares))) / n
    return drawn


def with_interval(value: float | Array, draws: Array, n: int) -> Estimate:
    """A value with the middle 95 % of its draws (percentile interval).

    No interval is given where more than one draw in twenty is not a number.
    """
    number = float(value)
    if np.isnan(number):
        return Estimate(None, n=n)
    known = draws[~np.isnan(draws)]
    if len(known) < 0.95 * len(draws) or not len(known):
        return Estimate(number, n=n)
    # method="lower"/"higher" never subtracts, so infinite draws stay infinite
    low = np.percentile(known, 2.5, method="lower")
    high = np.percentile(known, 97.5, method="higher")
    return Estimate(number, float(low), float(high), n)


@dataclass(frozen=True)
class Bounds:
    """A mean change; each end is a bound of its own, at the confidence asked for.

    Attributes:
        value: The change seen.
        low: The true one is above this.
        high: The true one is below this.
        error: Its standard error.
    """

    value: float
    low: float
    high: float
    error: float


def paired_change(
    changes: Array,
    weights: Array,
    imagined: tuple[float, float],
    confidence: float,
    rng: np.random.Generator,
) -> Bounds:
    """Mean change over items that were scored twice.

    A bootstrap that sees few items change, or none, takes the change for surer than it is. So it
    draws from two imagined items beside the real ones, and each bound stands off by one item more.
    Where no answer changed, the bound is then that of the rule of three, 3/n; and it agrees with
    the exact test of how many answers changed sides.

    Args:
        changes: [n], each item's.
        weights: [n], not negative, not all 0.
        imagined: The changes of the two, such as one won and one lost: (1, -1).
        confidence: Of each bound.
        rng: Where the randomness comes from.

    Source: Efron and Tibshirani 1993, chapter 13; Agresti and Min 2005, Simple improved confidence
        intervals for comparing matched proportions.
    """
    value = float((changes * weights).sum() / weights.sum())
    drawn = np.concatenate([changes, imagined])
    weighed = np.concatenate([weights, np.full(2, weights.mean())])
    draws = max(DRAWS, int(np.ceil(_TAIL / (1 - confidence))))
    # Answers change in three ways: one draw for each way, not for each answer.
    kinds, times = np.unique(np.stack([drawn, weighed]), axis=1, return_counts=True)
    means = resample(kinds[:1], kinds[1:], rng, draws, times)[:, 0]
    low, high = np.quantile(means, [1 - confidence, confidence]).tolist()
    step = abs(imagined[0] - imagined[1]) / 2 / len(drawn)
    return Bounds(value, min(low, value) - step, max(high, value) + step, float(means.std()))


def t975(degrees: int) -> float:
    """Student's t that is exceeded in one case of 40, for degrees of freedom from 1."""
    return _T975[min(degrees, len(_T975)) - 1]


def over_seeds(values: Sequence[float | None]) -> Estimate:
    """Mean over runs that differ in their seed, with Student's t interval.

    Two or three that are equal have none.

    It covers the randomness of training, which no bootstrap over examples sees.

    Args:
        values: One a seed; None is left out.
    """
    known = np.array([v for v in values if v is not None], dtype=np.float64)
    if not len(known):
        return Estimate(None)
    center = float(known.mean())
    if len(known) == 1:
        return Estimate(center, n=1)
    if len(known) < FEWEST_EQUAL and np.ptp(known) < 1e-12:
        return Estimate(center, n=len(known))  # scores are coarse: how far they vary is not seen
    half = t975(len(known) - 1) * float(known.std(ddof=1)) / len(known) ** 0.5
    return Estimate(center, center - half, center + half, len(known))
