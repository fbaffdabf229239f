"""Short measured runs of a short list on a user's own data, without its evaluation rows.

Rows to learn and rows to score are both drawn from the training rows of each task, so that what is
chosen by a pilot has not seen what the final run is scored on. Runs, folders and page are those of
`keeptune compare`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune.advice import Rule
from keeptune.comparison import Group
from keeptune.disk import write_atomic
from keeptune.errors import DataError
from keeptune.intervals import generator
from keeptune.ranking import rankings
from keeptune.recipe import Recipe, parse_recipe, resolve
from keeptune.rows import Rows
from keeptune.session import read_sources

LEAST = 16  # rows that a task must have, so that half of them can be scored


@dataclass(frozen=True)
class Size:
    """How large a pilot is.

    Attributes:
        rows: Rows of a task, at most: two thirds are learned and the others scored.
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
        learned, scored = _split(task.train, task.name, size.rows, recall=task.recall)
        for part, rows in (("train", learned), ("eval", scored)):
            values["tasks"][number][part] = _write(folder / f"{number}-{part}.jsonl", rows)
    values["guards"] = [guard for guard in values["guards"] if not _is_transfer(guard)]
    values["trainer"] = {**values["trainer"], "max_steps": size.steps}
    if private:
        values["privacy"] = "strict"
    return parse_recipe({**values, "watch": None, "budget": None, "out": None})


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


def _split(rows: Rows, name: str, most: int, *, recall: bool) -> tuple[list[Any], list[Any]]:
    """Rows to learn and rows to score, drawn by the content: none is both, except for recall."""
    each = list({json.dumps(row, sort_keys=True): row for row in rows.rows}.values())
    if len(each) < LEAST:
        raise DataError(
            f"Task {name!r} has {len(each)} different training rows, and a pilot learns a part of "
            f"them and scores the others: it needs at least {LEAST}. Leave --pilot out."
        )
    order = generator("pilot", name, rows.sha256).permutation(len(each))[:most]
    drawn = [each[i] for i in order]
    if recall:
        return drawn, drawn
    learned = 2 * len(drawn) // 3
    return drawn[:learned], drawn[learned:]


def _write(path: Path, rows: Sequence[Any]) -> str:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return str(path)


def _is_transfer(guard: Any) -> bool:
    return isinstance(guard, dict) and guard.get("transfer_of") is not None
