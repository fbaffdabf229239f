"""Short measured runs of a short list on a user's own data, without its evaluation rows.

Rows to learn and rows to score are both drawn from the training rows of each task, so that what is
chosen by a pilot has not seen what the final run is scored on. Runs, folders and page are those of
`keeptune compare`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keeptune.advice import Rule
from keeptune.comparison import Group
from keeptune.disk import write_atomic
from keeptune.errors import DataError
from keeptune.inputs import read_sources
from keeptune.intervals import generator
from keeptune.ranking import rankings
from keeptune.recipe import Recipe, parse_recipe, resolve
from keeptune.rows import Rows, part
from keeptune.stream import Task
from keeptune.validation import hold_out

LEAST = 16  # rows that a task must have
SCORED = 1 / 3  # share of the drawn rows that is not learned


@dataclass(frozen=True)
class Size:
    """How large a pilot is.

    Attributes:
        rows: Training rows of a task that are drawn, at most.
        steps: Steps of a task.
    """

    rows: int = 192
    steps: int = 60


def pilot_recipe(recipe: Recipe, folder: Path, size: Size, *, private: bool = False) -> Recipe:
    """The recipe of a pilot; its rows are written to files in a folder.

    The same rows give the same files, so that a pilot that was stopped goes on.

    Raises:
        KeeptuneError: The recipe or its data cannot be used, or there are too few rows.
    """
    tasks, _ = read_sources(recipe)
    values = resolve(recipe)
    for number, task in enumerate(tasks):
        held = _held(task, size.rows)
        values["tasks"][number]["score"] = held.score
        for part_of, rows in (("train", held.train), ("eval", held.eval)):
            values["tasks"][number][part_of] = _write(folder / f"{number}-{part_of}.jsonl", rows)
    values["guards"] = [guard for guard in values["guards"] if not _is_transfer(guard)]
    values["trainer"] = {**values["trainer"], "max_steps": size.steps}
    if private:
        values["privacy"] = "strict"
    return parse_recipe(values | dict.fromkeys(("watch", "budget", "validation", "out")))


def standing(groups: Sequence[Group]) -> list[str]:
    """The ranks in each metric, in words: one stands above another only where that is sure."""
    lines = []
    for ranking in rankings(groups):
        ranked = sorted(zip(ranking.places, groups, strict=True), key=lambda pair: pair[0].first)
        parts = []
        for place, group in ranked:
            ends = dict.fromkeys((place.first, place.last))
            parts.append(f"{'–'.join(map(str, ends))} {group.label}")
        lines.append(f"{ranking.metric.title}: {', '.join(parts)}")
        if all(duel.better == 0 for duel in ranking.duels):
            lines[-1] = f"{ranking.metric.title}: not distinguishable"
    return lines


def words_of(rules: Sequence[Rule]) -> str:
    """Plain training and a short list, as `keeptune compare` takes them."""
    return ",".join(["plain", *(rule.words for rule in rules)])


def _held(task: Task, most: int) -> Task:
    """A task on a draw of its training rows, the same whatever the runs' seeds are."""
    if len(task.train) < LEAST:
        raise DataError(
            f"Task {task.name!r} has {len(task.train)} training rows, and a pilot learns a part of "
            f"them and scores the others: it needs at least {LEAST}. Leave --pilot out."
        )
    order = generator("pilot", task.name, task.train.sha256).permutation(len(task.train))
    drawn = replace(task, train=part(task.train, sorted(order[:most].tolist())))
    # What is to be known by heart is scored on what was learned, as in the run itself.
    return replace(drawn, eval=drawn.train) if task.recall else hold_out(drawn, SCORED)


def _write(path: Path, rows: Rows) -> str:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows.rows)
    write_atomic(path, "".join(lines).encode())
    return str(path)


def _is_transfer(guard: Any) -> bool:
    return isinstance(guard, dict) and guard.get("transfer_of") is not None
