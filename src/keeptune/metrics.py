"""What was learned and what was kept: every metric of one run with its 95 % interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from keeptune import formulas
from keeptune.floors import floor
from keeptune.folder import RunFolder
from keeptune.intervals import Array, Estimate, with_interval
from keeptune.records import Unit
from keeptune.results import Kind, Results, load
from keeptune.tracks import Track, guard_track, task_track
from keeptune.units import UNITS, Scale, Shown, convert, shown_as


@dataclass(frozen=True)
class Definition:
    """A metric's formula and words.

    Attributes:
        key: Its name in code.
        title: Its name for people, for shares and for perplexities.
        meaning: One line: how to read it.
        source: Equation and paper.
        kind: Whether it is about tasks or guards.
        scale: "level" of goodness, "change" of it, a "loss" (a change that counts downwards), or a
            "ratio" of levels.
        formula: Goodness [..., rows, columns] to a number.
    """

    key: str
    title: tuple[str, str]
    meaning: str
    source: str
    kind: Kind
    scale: Scale
    formula: Callable[[Array], Array]


DEFINITIONS = (
    Definition(
        "learning_gain",
        ("Learned", "Perplexity change by learning"),
        "What training on each task added to it.",
        "1/T Σ (R[i,i] − R[0,i])",
        "task", "change", formulas.learning_gain,
    ),
    Definition(
        "learning_accuracy",
        ("Learning accuracy", "Perplexity when learned"),
        "Mean of each task right after it was learned.",
        "1/T Σ R[i,i] (Riemer 2019)",
        "task", "level", formulas.learning_accuracy,
    ),
    Definition(
        "average_accuracy",
        ("Average accuracy", "Average perplexity"),
        "Mean of all tasks at the end.",
        "1/T Σ R[T,i] (Lopez-Paz 2017)",
        "task", "level", formulas.average_accuracy,
    ),
    Definition(
        "average_incremental_accuracy",
        ("Average incremental accuracy", "Average incremental perplexity"),
        "Mean of the tasks so far, over the whole stream.",
        "1/T Σ_t 1/t Σ_{i≤t} R[t,i] (Rebuffi 2017)",
        "task", "level", formulas.average_incremental_accuracy,
    ),
    Definition(
        "backward_transfer",
        ("Backward transfer", "Perplexity change of earlier tasks"),
        "How earlier tasks changed after they were learned.",
        "1/(T−1) Σ_{i<T} (R[T,i] − R[i,i]) (Lopez-Paz 2017)",
        "task", "change", formulas.backward_transfer,
    ),
    Definition(
        "forgetting",
        ("Forgetting", "Perplexity above the best"),
        "Loss of earlier tasks from their best; noise alone lifts it a little above 0.",
        "1/(T−1) Σ_{i<T} (max_l R[l,i] − R[T,i]) (Chaudhry 2018)",
        "task", "loss", formulas.forgetting,
    ),
    Definition(
        "forward_transfer",
        ("Forward transfer", "Perplexity change before training"),
        "How tasks changed before their own training, against the untouched model.",
        "1/(T−1) Σ_{i>1} (R[i−1,i] − R[0,i]) (Lopez-Paz 2017)",
        "task", "change", formulas.forward_transfer,
    ),
    Definition(
        "guard_kept",
        ("Guards kept", ""),
        "What is left of the guards' scores, all guards together.",
        "Σ_m G[T,m] / Σ_m G[0,m]",
        "guard", "ratio", formulas.share_kept,
    ),
    Definition(
        "guard_change",
        ("Guard change", "Guard perplexity change"),
        "Mean change of the guards since before training.",
        "1/M Σ_m (G[T,m] − G[0,m])",
        "guard", "change", formulas.guard_change,
    ),
)  # fmt: skip

_PERPLEXITY = "_perplexity"  # behind the keys of metrics over perplexities

INTRANSIGENCE = Definition(
    "intransigence",
    ("Intransigence", "Perplexity above joint training"),
    "What training on all tasks so far at once learns more; negative: the stream helped.",
    "1/T Σ_k (J[k,k] − R[k,k]) (Chaudhry 2018)",
    "task",
    "loss",
    formulas.learning_accuracy,
)


@dataclass(frozen=True)
class Metric:
    """One number about a run.

    Attributes:
        key: Its name; perplexities have `_perplexity` at the end.
        title: Its name for people.
        meaning: How to read it, one line.
        source: Equation and paper.
        shown: "share" (0 to 1), "points" (a difference of shares, −1 to 1), "perplexity", or
            "relative" (change of a perplexity: 0.1 is 10 % higher, which is worse).
        estimate: The value, its interval, and the number of tasks or guards in it.
        reason: Why it has no value, else "".
    """

    key: str
    title: str
    meaning: str
    source: str
    shown: Shown
    estimate: Estimate
    reason: str = ""


@dataclass(frozen=True)
class Summary:
    """Everything a run's results come down to.

    Attributes:
        strategy: The methods' names.
        seed: The run's seed.
        learned: Tasks learned so far.
        planned: Tasks in the stream.
        metrics: In the order to be shown.
        tasks: The tasks learned so far.
        guards: All guards.
    """

    strategy: str
    seed: int
    learned: int
    planned: int
    metrics: list[Metric]
    tasks: list[Track]
    guards: list[Track]

    def metric(self, key: str) -> Metric | None:
        """A metric by its key; None where the run has none of that unit."""
        return next((m for m in self.metrics if m.key == key), None)


def summarise(folder: RunFolder, joint: RunFolder | None = None) -> Summary:
    """Everything a run's results come down to, with 95 % paired bootstrap intervals over examples.

    Args:
        folder: The run; it need not be finished.
        joint: A run of the method `joint` on the same tasks, for intransigence.
    """
    return summarise_results(load(folder), load(joint) if joint else None)


def summarise_results(results: Results, joint: Results | None = None) -> Summary:
    """`summarise` for results already read."""
    info = results.folder.info
    return Summary(
        strategy=info.strategy,
        seed=info.seed,
        learned=len(results.tasks),
        planned=len(info.tasks),
        metrics=[
            _metric(results, definition, unit, joint)
            for unit in UNITS
            for definition in (*DEFINITIONS, INTRANSIGENCE)
            if applies(results, definition, unit)
        ],
        tasks=[task_track(column, i) for i, column in enumerate(results.tasks)],
        guards=[guard_track(column) for column in results.guards],
    )


def key_of(definition: Definition, unit: Unit) -> str:
    """The key of a metric over shares or over perplexities."""
    return definition.key + _PERPLEXITY * (unit == "perplexity")


def find(key: str) -> tuple[Definition, Unit]:
    """The metric of a key that `key_of` gave."""
    name, unit = key.removesuffix(_PERPLEXITY), UNITS[key.endswith(_PERPLEXITY)]
    return next(d for d in (*DEFINITIONS, INTRANSIGENCE) if d.key == name), unit


def applies(results: Results, definition: Definition, unit: Unit) -> bool:
    """Whether a metric makes sense for a run: shares always, perplexities where there are some."""
    if unit == "share":
        return True
    columns = results.tasks + results.waiting if definition.kind == "task" else results.kept
    return definition.scale != "ratio" and any(c.info.unit == unit for c in columns)


def raw(
    results: Results, definition: Definition, unit: Unit, joint: Results | None = None
) -> tuple[float, Array]:
    """A metric's value and its draws, in goodness; NaN where it is not defined."""
    undefined = float("nan"), np.full(1, np.nan)
    if not results.tasks or not (definition.kind == "task" or results.kept):
        return undefined
    with np.errstate(invalid="ignore"):
        value = definition.formula(results.goodness(definition.kind, unit))
        draws = definition.formula(results.draws(definition.kind, unit))
        if definition is INTRANSIGENCE:
            if joint is None or not _same_tasks(results, joint):
                return undefined
            value = formulas.intransigence(
                results.goodness("task", unit), joint.goodness("task", unit)
            )
            draws = formulas.intransigence(results.draws("task", unit), joint.draws("task", unit))
    return float(value), draws


def _same_tasks(results: Results, joint: Results) -> bool:
    return [c.info.name for c in results.tasks] == [c.info.name for c in joint.tasks]


def _metric(results: Results, definition: Definition, unit: Unit, joint: Results | None) -> Metric:
    value, draws = raw(results, definition, unit, joint)
    columns = results.tasks if definition.kind == "task" else results.kept
    n = sum(c.info.unit == unit for c in columns)
    shown = shown_as(definition.scale, unit)
    key = key_of(definition, unit)
    spread = results.spread("metric", key)
    found = replace(with_interval(value, draws, n), floor=floor(spread, 1) if spread else 0.0)
    return Metric(
        key=key,
        title=definition.title[UNITS.index(unit)],
        meaning=definition.meaning,
        source=definition.source,
        shown=shown,
        estimate=convert(found, definition.scale, shown),
        reason=_reason(results, definition, unit, joint) if np.isnan(value) else "",
    )


def _reason(results: Results, definition: Definition, unit: Unit, joint: Results | None) -> str:
    if not results.tasks:
        return "no task is learned yet"
    if definition.kind == "guard":
        known = any(c.info.unit == unit for c in results.kept)
        return "the guards scored 0 before training" if known else f"no guard with a {unit}"
    if not any(c.info.unit == unit for c in results.tasks):
        return f"no task with a {unit}"
    if definition is INTRANSIGENCE:
        return (
            "needs a run of the method joint on the same tasks"
            if joint is None
            else ("the joint run learned other tasks")
        )
    if len(results.tasks) == 1:
        return "needs two tasks or more"
    return "not evaluated in the rows it needs"
