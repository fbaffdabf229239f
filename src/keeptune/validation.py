"""A share of the training rows held out, and scored in place of the evaluation rows.

So settings can be chosen without a look at the rows that the result is later measured on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from keeptune.errors import DataError, RecipeError
from keeptune.guard import Guard
from keeptune.intervals import generator
from keeptune.rows import Rows, new_rows, part
from keeptune.scorers import DEFAULTS, check_score
from keeptune.stream import Task


def hold_out(task: Task, share: float) -> Task:
    """A task that is scored on some of its training rows, and trained on the others.

    Training rows that are evaluation rows too are trained on, never held out. The same rows give
    the same draw whatever a run's seed is, so that runs of several seeds are scored on the same.

    Args:
        task: The task.
        share: Of the training rows, 0 to 1; one row at least.

    Raises:
        RecipeError: The task is scored on recall.
        DataError: Too few rows.
    """
    if task.recall:
        raise RecipeError(
            f"validation: task {task.name!r} is scored on recall, so that its evaluation rows are "
            "training rows on purpose and none can be held out. Leave the task out."
        )
    free = new_rows(task.eval, task.train)
    if not free or len(task.train) < 2:
        raise DataError(
            f"validation: task {task.name!r} has {len(free)} of {len(task.train)} training rows "
            "that are no evaluation rows, too few to hold one out and train on the others."
        )
    chosen = _drawn(free, round(share * len(task.train)), ("task", task.name), task.train)
    rest = sorted(set(range(len(task.train))) - set(chosen))
    held = part(task.train, chosen)
    return replace(task, train=part(task.train, rest), eval=held, score=_score(task.score, held))


def _score(score: str, held: Rows) -> str:
    """The score; where training rows have another shape and it does not fit, theirs."""
    try:
        check_score(score, held)
    except DataError:
        return DEFAULTS[held.shape]
    return score


def sampled(guard: Guard, share: float) -> Guard:
    """A guard on some of its rows; one of lm-eval stays as it is."""
    if guard.rows is None:
        return guard
    count, every = round(share * len(guard.rows)), range(len(guard.rows))
    chosen = _drawn(every, count, ("guard", guard.name), guard.rows)
    return replace(guard, rows=part(guard.rows, chosen))


def _drawn(positions: Sequence[int], count: int, words: tuple[str, str], rows: Rows) -> list[int]:
    """So many of the positions, at least one, but never all rows; in their order."""
    most = max(1, min(count, len(positions), len(rows) - 1))
    random = generator("validation", *words, rows.sha256)
    return sorted(random.choice(positions, most, replace=False).tolist())
