"""What must not fall, and how far it may: guards and earlier tasks, compared with earlier scores.

A line is judged by the same examples before and now. What is said about it holds with the
confidence asked for, by `intervals.paired_change`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from keeptune.errors import RecipeError, suggest
from keeptune.folder import RunFolder
from keeptune.guard import Guard
from keeptune.guards import GROUPS
from keeptune.intervals import Array, Bounds, generator, paired_change
from keeptune.privacy import without_text
from keeptune.recipe_parts import BudgetRecipe, WatchRecipe
from keeptune.records import Example, Kind, Unit
from keeptune.rows import Rows
from keeptune.scorers import cell_score
from keeptune.stream import Task, TaskStream
from keeptune.watchlog import Point, Role

PAST = "past_tasks"
FEWEST = 8  # rows below which nothing is sure
Scorer = Callable[["Probe"], Sequence[Example]]
# Whether a line is below what is allowed, by its change at any confidence.
Judge = Callable[[float, Callable[[float], Bounds]], bool]


@dataclass(frozen=True)
class Probe:
    """Some rows of one task or guard.

    Attributes:
        kind: "task" or "guard".
        index: Its position among those of its kind.
        item: The task or guard.
        ids: Positions of the rows among its evaluation rows.
        before: The row of R that holds the scores to compare with.
    """

    kind: Kind
    index: int
    item: Task | Guard
    ids: Sequence[int]
    before: int

    @property
    def rows(self) -> Rows:
        """The rows themselves."""
        every = _rows(self.item)
        return dataclasses.replace(every, rows=[every.rows[i] for i in self.ids])


@dataclass(frozen=True)
class Line:
    """Rows that are judged together.

    Attributes:
        name: Of the guard, the group or the task.
        role: As in `Point`.
        probes: The rows; all of one unit.
        allowed: As in `Point`.
    """

    name: str
    role: Role
    probes: Sequence[Probe]
    allowed: float | None

    @property
    def unit(self) -> Unit:
        """The unit of its scores."""
        return self.probes[0].item.unit

    @property
    def size(self) -> int:
        """Its number of rows."""
        return sum(len(probe.ids) for probe in self.probes)

    def part(self, positions: Sequence[int]) -> Line:
        """The same with only some of its rows, by their positions in it."""
        wanted, start, probes = set(positions), 0, []
        for probe in self.probes:
            own = [i for at, i in enumerate(probe.ids, start) if at in wanted]
            start += len(probe.ids)
            if own:
                probes.append(dataclasses.replace(probe, ids=own))
        return dataclasses.replace(self, probes=probes)


# -- which lines there are ------------------------------------------------------------------------


def watched(
    settings: WatchRecipe, stream: TaskStream, guards: Sequence[Guard], index: int, seed: int
) -> list[Line]:
    """The samples to look at while a task is learned; what it learns comes first."""
    here = stream[index]
    lines = [Line(here.name, "learning", [_probe("task", index, here, index)], None)]
    if settings.tasks == "past":
        lines += [
            Line(
                task.name,
                "task",
                [_probe("task", i, task, index)],
                _allowed(settings.lines.get(PAST, 0.0), task.unit, is_past=True),
            )
            for i, task in enumerate(list(stream)[:index])
        ]
    for name in watched_names(settings, guards):
        allowed = settings.lines.get(name, 0.0)
        lines += guard_lines(name, guards, index, allowed)
    return [_sampled(line, settings.items, seed) for line in lines]


def watched_names(settings: WatchRecipe, guards: Sequence[Guard]) -> list[str]:
    """The guards and groups to look at: those listed, or those with a line and all others."""
    if settings.guards is not None:
        return settings.guards
    named = [name for name in settings.lines if name != PAST]
    covered = {g.name for name in named for _, g in members(name, guards)}
    return [*named, *(g.name for g in guards if g.rows and g.name not in covered)]


def held(
    settings: BudgetRecipe, stream: TaskStream, guards: Sequence[Guard], index: int
) -> list[Line]:
    """The lines of a budget when a task has been learned; what it learned comes first.

    Guards are compared with the model before any training, tasks with the score right after they
    were learned: a budget is for the whole stream.
    """
    here = stream[index]
    lines = [Line(here.name, "learning", [_probe("task", index, here, index)], None)]
    for name, loss in settings.guards.items():
        lines += guard_lines(name, guards, 0, loss)
    past = list(enumerate(stream))[:index] if settings.past_tasks is not None else []
    units: tuple[Unit, Unit] = ("share", "perplexity")
    for unit in units:
        probes = [_probe("task", i, task, i + 1) for i, task in past if task.unit == unit]
        if probes:
            name = "past tasks" if unit == "share" else "past tasks, perplexity"
            allowed = _allowed(settings.past_tasks or 0.0, unit, is_past=True)
            lines.append(Line(name, "task", probes, allowed))
    return lines


def halves(line: Line, seed: int) -> tuple[Line, Line]:
    """Its rows in two halves, the same ones each time."""
    order = generator(seed, "budget", line.name).permutation(line.size).tolist()
    middle = (line.size + 1) // 2
    return line.part(order[:middle]), line.part(order[middle:])


def members(name: str, guards: Sequence[Guard]) -> list[tuple[int, Guard]]:
    """The guards that a name means: one, or those of a ready-made group, with their positions."""
    names = (name, *GROUPS.get(name, ()))
    return [(i, guard) for i, guard in enumerate(guards) if guard.name in names]


def refuse_unknown(
    watch: WatchRecipe | None,
    budget: BudgetRecipe | None,
    stream: TaskStream,
    guards: Sequence[Guard],
) -> None:
    """Refuse names that no guard has, and rows that are too few for a budget.

    Raises:
        RecipeError: With every problem, one line each.
    """
    problems = [
        problem
        for field, names, allowed in _named(watch, budget, guards)
        for name in names
        if (problem := _unknown(field, name, guards, allowed))
    ]
    if budget is not None and not problems:
        few = [
            f"{line.name!r} ({line.size})"
            for index in range(len(stream))
            for line in held(budget, stream, guards, index)
            if line.allowed is not None and line.size < 2 * FEWEST
        ]
        if few:
            problems.append(
                f"budget needs at least {2 * FEWEST} evaluation rows of each, half of them to find "
                "a step and half to confirm it; too few are those of "
                f"{', '.join(dict.fromkeys(few))}."
            )
    if problems:
        raise RecipeError("\n".join(problems))


def refuse_unknown_names(field: str, names: Sequence[str], guards: Sequence[Guard]) -> None:
    """Refuse names that no guard has, and guards that have no rows of their own.

    Raises:
        RecipeError: With every problem, one line each.
    """
    allowed = _names(guards)
    if problems := [said for name in names if (said := _unknown(field, name, guards, allowed))]:
        raise RecipeError("\n".join(problems))


def _names(guards: Sequence[Guard]) -> list[str]:
    return [g.name for g in guards] + [n for n in GROUPS if members(n, guards)]


def _named(
    watch: WatchRecipe | None, budget: BudgetRecipe | None, guards: Sequence[Guard]
) -> Iterator[tuple[str, Sequence[str], list[str]]]:
    every = _names(guards)
    if watch is not None:
        yield "watch.guards", watch.guards or [], every
        looked_at = [PAST, *(every if watch.guards is None else watch.guards)]
        yield "watch.lines", [name for name in watch.lines if name != PAST], looked_at
    if budget is not None:
        yield "budget", list(budget.guards), [*every, PAST]


def _unknown(field: str, name: str, guards: Sequence[Guard], allowed: list[str]) -> str:
    found = members(name, guards)
    if not found or name not in allowed:
        return f"{field} names {name!r}, which is no guard here. {suggest(name, allowed)}"
    if any(guard.rows is None for _, guard in found):
        return (
            f"{field} names {name!r}, a task of lm-eval, which scores no rows one by one. Take it "
            "out, or give its rows as a guard of your own."
        )
    return ""


def guard_lines(name: str, guards: Sequence[Guard], before: int, loss: float) -> list[Line]:
    """The lines of a guard or group: one, or two where its guards have different units.

    Args:
        name: Of the guard or the group.
        guards: All there are.
        before: As in `Probe`.
        loss: What it may lose, as a user writes it.
    """
    found = members(name, guards)
    lines = []
    for unit in sorted({guard.unit for _, guard in found}):
        probes = [_probe("guard", i, g, before) for i, g in found if g.unit == unit]
        lines.append(Line(name, "guard", probes, _allowed(loss, unit)))
    return lines


def _probe(kind: Kind, index: int, item: Task | Guard, before: int) -> Probe:
    return Probe(kind, index, item, range(len(_rows(item))), before)


def _rows(item: Task | Guard) -> Rows:
    rows = item.eval if isinstance(item, Task) else item.rows
    assert rows is not None
    return rows


def _allowed(loss: float, unit: Unit, *, is_past: bool = False) -> float:
    """A loss as a user writes it, in goodness: points, or a relative rise of a perplexity.

    Tasks of both units share one number, so that points mean percent for perplexities there.
    """
    if unit == "share":
        return loss / 100
    return math.log1p(loss / 100 if is_past else loss)


def _sampled(line: Line, items: int, seed: int) -> Line:
    order = generator(seed, "watch", line.name).permutation(line.size)
    part = line.part(order[:items].tolist())
    return part if part.size >= FEWEST else dataclasses.replace(part, allowed=None)


# -- what they show -------------------------------------------------------------------------------


class Earlier:
    """What rows scored before, as a run folder has it; each file is read once.

    Args:
        folder: The run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._known: dict[tuple[int, Kind, int], dict[int, Example]] = {}

    def __call__(self, probe: Probe) -> list[Example]:
        """The results of a probe's rows, without their texts."""
        key = (probe.before, probe.kind, probe.index)
        if key not in self._known:
            cell = self._folder.cell(*key)
            assert cell is not None
            self._known[key] = {example.id: without_text(example) for example in cell.examples}
        return [self._known[key][i] for i in probe.ids]


def point(line: Line, score: Scorer, before: Scorer, confidence: float, is_below: Judge) -> Point:
    """Score a line's rows and compare them with their scores before.

    Args:
        line: What.
        score: Scores rows, with what the model is now.
        before: Knows what they scored before.
        confidence: Of each bound.
        is_below: Judges the change of a line that has an allowance.
    """
    now = [example for probe in line.probes for example in score(probe)]
    earlier = [example for probe in line.probes for example in before(probe)]
    found = change(now, earlier, line, confidence)
    return Point(
        name=line.name,
        role=line.role,
        unit=line.unit,
        n=len(now),
        score=cell_score(now, line.unit),
        change=found.value,
        low=found.low,
        high=found.high,
        allowed=line.allowed,
        is_below=line.allowed is not None
        and is_below(line.allowed, lambda sure: change(now, earlier, line, sure)),
    )


def change(
    now: Sequence[Example], before: Sequence[Example], line: Line, confidence: float
) -> Bounds:
    """The mean change for the better of the same examples, with a bound on each side."""
    sign = 1.0 if line.unit == "share" else -1.0
    pairs = zip(now, before, strict=True)
    changes: Array = np.array([sign * (a.score - b.score) for a, b in pairs], dtype=np.float64)
    weights: Array = np.array([example.weight for example in now], dtype=np.float64)
    # An answer can turn from right to wrong; a likelihood moves about as far as the others do.
    mean, spread = float(changes.mean()), float(changes.std())
    imagined = (1.0, -1.0) if line.unit == "share" else (mean + spread, mean - spread)
    rng = generator("paired", line.name, len(now))
    return paired_change(changes, weights, imagined, confidence, rng)
