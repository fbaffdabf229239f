"""What the report shows of strategies in pairs: ranks, tests, the front, and every single run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from keeptune.comparison import Group, order_of
from keeptune.ranking import Duel, Place, Ranking, rankings
from keeptune.report.axes import Scatter
from keeptune.units import Shown
from keeptune.wording import estimate_text

WORDS = {1: "better", -1: "worse", 0: "not distinguishable"}
NOISE = "within the noise"


@dataclass(frozen=True)
class RankCell:
    """A rank as a range, and the strategies that cannot be told from it."""

    rank: str
    like: list[str]


@dataclass(frozen=True)
class RankRow:
    """One strategy; `front` says where it stands to the front."""

    label: str
    style: str
    cells: list[RankCell]
    front: str


@dataclass(frozen=True)
class DuelRow:
    """One strategy minus another: one cell a metric, each with its word."""

    one: str
    other: str
    cells: list[tuple[str, str]]


@dataclass(frozen=True)
class RunRow:
    """One run; `said` is why it failed, else ""."""

    folder: str
    label: str
    seed: str
    order: str
    said: str
    seconds: float | None


@dataclass(frozen=True)
class Standing:
    """Ranks and tests.

    Attributes:
        titles: The metrics.
        ranks: One row a strategy.
        duels: One row for every two strategies.
        by_chance: How many differences look clear though there is none, on average.
        front: Names of the strategies on the front; empty where there is no figure.
        apart: Names of the strategies left out of the front, as they train on all tasks at once.
    """

    titles: list[str]
    ranks: list[RankRow]
    duels: list[DuelRow]
    by_chance: float
    front: list[str]
    apart: list[str]


def standing(groups: Sequence[Group], styles: Sequence[str], figure: Scatter | None) -> Standing:
    """Ranks and tests of every two strategies."""
    ranked = rankings(groups)
    labels = [group.label for group in groups]
    spots = figure.spots if figure else []
    places = {s.label: "on the front" if s.is_front else "behind" for s in spots}
    on_front = [label for label, place in places.items() if place == "on the front"]
    apart = [group.label for group in groups if group.is_joint]
    pairs = len(groups) * (len(groups) - 1) // 2
    return Standing(
        titles=[ranking.metric.title for ranking in ranked],
        ranks=[
            RankRow(
                label,
                style,
                [_rank(ranking.places[i], labels) for ranking in ranked],
                "ceiling" if label in apart else places.get(label, "no value"),
            )
            for i, (label, style) in enumerate(zip(labels, styles, strict=True))
        ],
        duels=[
            DuelRow(labels[duels[0].one], labels[duels[0].other], _cells(duels, ranked))
            for duels in zip(*(ranking.duels for ranking in ranked), strict=True)
        ],
        by_chance=0.05 * pairs * len(ranked),
        front=on_front,
        apart=apart,
    )


def _rank(place: Place, labels: Sequence[str]) -> RankCell:
    rank = str(place.first) if place.first == place.last else f"{place.first}–{place.last}"
    return RankCell(rank, [labels[i] for i in place.like])


def _cells(duels: Sequence[Duel], ranked: Sequence[Ranking]) -> list[tuple[str, str]]:
    cells = []
    for duel, ranking in zip(duels, ranked, strict=True):
        is_share = ranking.metric.shown in ("share", "points")
        shown: Shown = "points" if is_share else "relative"
        word = NOISE if duel.gap is not None and duel.gap.is_noise else WORDS[duel.better]
        cells.append((estimate_text(duel.gap, shown), word))
    return cells


def run_rows(groups: Sequence[Group], failed: Sequence[tuple[Path, str]]) -> list[RunRow]:
    """Every run, those that failed last."""
    rows = []
    for group in groups:
        for run in group.results:
            seconds = sum(phase.seconds for phase in run.folder.cost().phases)
            order = " → ".join(order_of(run))
            seed, name = str(run.folder.info.seed), run.folder.path.name
            rows.append(RunRow(name, group.label, seed, order, "", seconds))
    return rows + [RunRow(path.name, "–", "–", "–", said, None) for path, said in failed]
