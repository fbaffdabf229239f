"""What must not fall, and how far it may: guards and earlier tasks, against earlier scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from keeptune.errors import RecipeError, suggest
from keeptune.guard import Guard
from keeptune.guards import GROUPS
from keeptune.intervals import generator
from keeptune.recipe_parts import BudgetRecipe, WatchRecipe
from keeptune.records import Kind, Unit
from keeptune.rows import Rows
from keeptune.stream import Task, TaskStream
from keeptune.watchlog import Role

PAST = "past_tasks"
FEWEST = 8  # rows below which nothing is sure


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
    settings: WatchRecipe,
    budget: BudgetRecipe | None,
    stream: TaskStream,
    guards: Sequence[Guard],
    index: int,
    seed: int,
) -> list[Line]:
    """The samples to look at while a task is learned; what it learns comes first.

    All are compared with their scores before the task. But what strengthens its methods to keep a
    budget counts as the budget does, see `held`.
    """
    here = stream[index]
    lines = [Line(here.name, "learning", [_probe("task", index, here, index)], None)]
    kept = budget if settings.on_drop == "strengthen" else None
    spent = {} if kept is None else kept.guards
    past = None if kept is None else kept.past_tasks
    for i, task in enumerate(list(stream)[:index] if settings.tasks == "past" else []):
        probe = _probe("task", i, task, index if past is None else i + 1)
        loss = settings.lines.get(PAST, 0.0) if past is None else past
        lines.append(Line(task.name, "task", [probe], _allowed(loss, task.unit, is_past=True)))
    for name in watched_names(settings, list(spent), guards):
        if name in spent:
            lines += guard_lines(name, guards, 0, spent[name])
        else:
            lines += guard_lines(name, guards, index, settings.lines.get(name, 0.0))
    return [_sampled(line, settings.items, seed) for line in lines]


def watched_names(
    settings: WatchRecipe, budgeted: Sequence[str], guards: Sequence[Guard]
) -> list[str]:
    """The guards and groups to look at: those listed, or those with a line and all others."""
    if settings.guards is not None:
        return settings.guards
    named = [name for name in dict.fromkeys([*settings.lines, *budgeted]) if name != PAST]
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
    # A guard of the name of a setting would be taken for it.
    asked = budget.model_fields_set if budget is not None else set()
    problems += [
        f"budget.{name} is a setting of the budget, and a guard is called {name!r} too. Give the "
        "guard another name."
        for name in sorted(asked & {guard.name for guard in guards} & {*BudgetRecipe.model_fields})
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
