"""Who gets the places of a buffer, and who is drawn from it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Up to so many positions are shuffled to draw some, as all were in the runs that are published; of
# more, a few are found without looking at the others.
SHUFFLED = 10_000
Order = NDArray[np.int64]


def reservoir(
    kept: int, new: int, seen: int, size: int | None, random: np.random.Generator
) -> Order:
    """Algorithm R (Vitter 1985): after n rows each is kept with probability min(1, size / n).

    Args:
        kept: Places that are taken; fewer than `seen` and `size` after rows were deleted.
        new: Rows that come now.
        seen: Rows that came before.
        size: All places; None for as many as there are rows.
        random: Its numbers decide which row takes which place.

    Returns:
        What each place then holds: the number of a place before, or `kept` + that of a new row.
    """
    if size is None:
        return np.arange(kept + new)
    filled = min(seen, size)
    free = min(size - filled, new)
    # Rows that were deleted left places empty; which, is all the same.
    empty = np.full(filled - kept, -1)
    order = np.concatenate([np.arange(kept), empty, kept + np.arange(free)])
    # The n-th row of all takes the place that it draws among n, if there is such a place.
    places = random.integers(np.arange(seen + free, seen + new) + 1)
    taken = places < size
    np.put(order, places[taken], kept + np.arange(free, new)[taken])  # the last one stays
    return order[order >= 0]


def even_shares(sizes: NDArray[np.integer], places: int) -> list[int]:
    """Places shared out as evenly as can be, none getting more than it can fill.

    Args:
        sizes: What each could fill.
        places: How many there are.

    Returns:
        min(size, level) for each, the first ones one more where places are left over.
    """
    left, level = places, 0
    for above, size in zip(range(len(sizes), 0, -1), sorted(sizes.tolist()), strict=True):
        level = min(size, left // above)
        if level < size:
            break
        left -= size
    shares = np.minimum(sizes, level)
    (more,) = np.nonzero(sizes > level)
    shares[more[: places - int(shares.sum())]] += 1
    return [int(share) for share in shares]


def pick(
    count: int,
    chances: NDArray[np.float64] | None,
    able: int,
    random: np.random.Generator,
    *,
    repeats: bool,
) -> Order:
    """Positions drawn at random.

    Args:
        count: How many; without repeats, at most as many as can be drawn.
        chances: Relative chance of each row; None where all are the same.
        able: How many can be drawn.
        random: Decides which.
        repeats: Whether one may come twice.
    """
    if repeats:
        rows = able if chances is None else len(chances)
        return random.choice(rows, count, p=None if chances is None else chances / chances.sum())
    if chances is None and able <= SHUFFLED:
        return random.permutation(able)[:count]
    if chances is None:
        return random.choice(able, min(count, able), replace=False)
    # The first arrivals are a weighted draw without repeats (Efraimidis and Spirakis 2006).
    with np.errstate(divide="ignore"):
        arrivals = random.exponential(size=len(chances)) / chances
    return np.argsort(arrivals, kind="stable")[: min(count, able)]
