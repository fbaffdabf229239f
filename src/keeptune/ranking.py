"""Who is better than whom: every two strategies compared in pairs, ranks, and the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from keeptune.comparison import Group, difference
from keeptune.intervals import Estimate
from keeptune.metrics import Metric

# What strategies are ranked by, where the runs have it.
KEYS = (
    "learning_gain",
    "learning_gain_perplexity",
    "guard_kept",
    "guard_change_perplexity",
    "backward_transfer",
    "backward_transfer_perplexity",
    "average_accuracy",
    "average_accuracy_perplexity",
)


@dataclass(frozen=True)
class Duel:
    """One strategy minus another in one metric.

    Attributes:
        one: Position of the first group.
        other: Position of the second.
        gap: First minus second, paired; None where one of them has no value.
        better: 1 when the first is better, -1 when the second is, 0 when they cannot be told apart.
    """

    one: int
    other: int
    gap: Estimate | None
    better: int


@dataclass(frozen=True)
class Place:
    """A strategy's rank in one metric: a range, as wide as what cannot be told apart.

    Attributes:
        first: 1 + the strategies that are better.
        last: All strategies - those that are worse.
        like: Positions of the groups that cannot be told from it.
    """

    first: int
    last: int
    like: list[int]


@dataclass(frozen=True)
class Ranking:
    """All strategies in one metric.

    Attributes:
        metric: The metric, of the first group.
        duels: Every two of them.
        places: One a group.
    """

    metric: Metric
    duels: list[Duel]
    places: list[Place]


def rankings(groups: Sequence[Group]) -> list[Ranking]:
    """Rank groups by each metric that all of them have.

    A is better than B where the 95 % interval of their paired difference leaves out 0.
    """
    found = []
    for key in KEYS:
        metrics = [group.metric(key) for group in groups]
        if all(m is not None and m.estimate.value is not None for m in metrics):
            assert metrics[0] is not None
            duels = [
                _duel(groups, one, other, key) for one, other in combinations(range(len(groups)), 2)
            ]
            places = [_place(i, len(groups), duels) for i in range(len(groups))]
            found.append(Ranking(metrics[0], duels, places))
    return found


def _duel(groups: Sequence[Group], one: int, other: int, key: str) -> Duel:
    gap = difference(groups[one].results, groups[other].results, key)
    if gap is None:
        return Duel(one, other, None, 0)
    better = int(gap.is_above) - int(gap.is_below)
    return Duel(one, other, gap, -better if key.endswith("_perplexity") else better)


def _place(position: int, groups: int, duels: Sequence[Duel]) -> Place:
    above, below, like = 0, 0, []
    for duel in duels:
        if position in (duel.one, duel.other):
            won = duel.better if position == duel.one else -duel.better
            above += won < 0
            below += won > 0
            like += [] if won else [duel.other if position == duel.one else duel.one]
    return Place(1 + above, groups - below, like)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points that no other one beats: as good in both, and better in one."""
    return [
        i
        for i, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)
    ]
