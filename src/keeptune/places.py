"""Who gets the places of a buffer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
