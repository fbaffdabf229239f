"""Which rows stand for all of them: by their features, best first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float32]
Order = NDArray[np.int64]
ROUNDS = 20  # of Lloyd's algorithm; it nearly always stops before
CHUNK = 4096  # rows whose distances are held at a time
# Squared distances within this factor of the least count as equal, and the first row is taken: two
# rows are as far from their mean, and rounding, which is another on other machines, would choose.
TIE = 1.001


def herd(features: Features, count: int) -> Order:
    """Rows whose running mean is nearest to the mean of all (herding; Welling 2009).

    As in iCaRL (Rebuffi et al. 2017, https://arxiv.org/abs/1611.07725, algorithm 4): features of
    length 1, one row after another without repeats, so that every beginning is a good choice too.

    Args:
        features: [n, d].
        count: How many rows, at most n.

    Returns:
        [count] row numbers, in the order they were chosen.
    """
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = (features / np.maximum(norms, np.finfo(np.float32).tiny)).astype(np.float32)
    mean = unit.mean(0)
    squares = np.einsum("ij,ij->i", unit, unit)
    order = np.empty(count, np.int64)
    total = np.zeros_like(mean)
    free = np.zeros(len(unit))
    for k in range(count):
        # ‖mean − (total + φ) / (k + 1)‖², times (k + 1)².
        behind = total - (k + 1) * mean
        apart = squares + 2 * (unit @ behind) + behind @ behind + free
        order[k] = np.argmax(apart <= TIE * apart.min() + 1e-6)
        free[order[k]] = np.inf
        total += unit[order[k]]
    return order


def spread(features: Features, count: int, random: np.random.Generator) -> Order:
    """Rows nearest to the centres of `count` clusters, the largest cluster first.

    Lloyd's algorithm from k-means++ seeds (Arthur and Vassilvitskii 2007). Where fewer clusters
    than `count` are left, as among equal rows, the first of the other rows fill up.

    Args:
        features: [n, d].
        count: How many rows, at most n.
        random: Draws the seeds.

    Returns:
        [count] row numbers without repeats.
    """
    if count == 0:
        return np.empty(0, np.int64)
    # Hidden states have much in common, in whose square their differences would be rounded away.
    features = features - features.mean(0)
    centres = _seeds(features, count, random)
    owners, distances = _nearest(features, centres)
    for _ in range(ROUNDS):
        by_cluster = np.argsort(owners, kind="stable")
        # A cluster that lost all its rows stays where it was.
        left, first, sizes = np.unique(owners[by_cluster], return_index=True, return_counts=True)
        sums = np.add.reduceat(features[by_cluster], first, axis=0, dtype=np.float64)
        centres[left] = (sums / sizes[:, None]).astype(np.float32)
        before = owners
        owners, distances = _nearest(features, centres)
        if np.array_equal(owners, before):
            break
    least = np.full(count, np.inf)
    np.minimum.at(least, owners, distances)
    (near,) = np.nonzero(distances <= TIE * least[owners])
    clusters, first = np.unique(owners[near], return_index=True)
    sizes = np.bincount(owners, minlength=count)[clusters]
    chosen = near[first][np.argsort(-sizes, kind="stable")]
    others = np.setdiff1d(np.arange(len(features)), chosen)
    return np.concatenate([chosen, others])[:count]


def _seeds(features: Features, count: int, random: np.random.Generator) -> Features:
    """Rows drawn one after another, each by its squared distance to those before."""
    chosen = [int(random.integers(len(features)))]
    _, far = _nearest(features, features[chosen])
    while len(chosen) < count:
        heights = np.cumsum(far, dtype=np.float64)
        aim = random.random() * heights[-1]
        chosen.append(min(int(np.searchsorted(heights, aim, side="right")), len(features) - 1))
        far = np.minimum(far, _nearest(features, features[chosen[-1:]])[1])
    return features[chosen].copy()


def _nearest(features: Features, centres: Features) -> tuple[Order, Features]:
    """Of each row: its nearest centre, and the squared distance to it."""
    owners = np.empty(len(features), np.int64)
    distances = np.empty(len(features), np.float32)
    squares = np.einsum("ij,ij->i", centres, centres)
    for begin in range(0, len(features), CHUNK):
        part = features[begin : begin + CHUNK]
        apart = squares - 2 * (part @ centres.T)
        nearest = apart.argmin(1)
        own = np.einsum("ij,ij->i", part, part)
        owners[begin : begin + CHUNK] = nearest
        found = apart[np.arange(len(part)), nearest] + own
        # Rounding must not make equal rows seem apart.
        distances[begin : begin + CHUNK] = np.where(found > 1e-6 * own, found, 0)
    return owners, distances
