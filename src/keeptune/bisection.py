"""The largest share of a change that still holds, by trying."""

from __future__ import annotations

from collections.abc import Callable

HALVINGS = 5  # a share is found to 1/32


def largest_share(holds: Callable[[float], bool]) -> float:
    """The largest share that holds, if no larger one holds where a smaller one does not.

    Args:
        holds: Tries a share; 1 first, and others only where that does not hold. 0 always does, and
            is not tried.
    """
    if holds(1.0):
        return 1.0
    share, beyond = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (share + beyond) / 2
        if holds(middle):
            share = middle
        else:
            beyond = middle
    return share
