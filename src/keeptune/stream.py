"""Task and TaskStream: named data in an order, each with its score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from keeptune.errors import RecipeError
from keeptune.records import Unit
from keeptune.rows import Rows, Shape, leaked, new_rows
from keeptune.scorers import DEFAULTS, check_score, unit

LONGEST_NAME = 80  # characters


@dataclass(frozen=True)
class Task:
    """Named training and evaluation data with a score.

    Attributes:
        name: 1 to 80 printable characters.
        train: What is learned.
        eval: What the score is taken on; never trained on.
        score: See `keeptune.scorers`; "" takes the usual one for the shape of `eval`.
        max_new_tokens: Longest generated answer; None is the expected answer's length plus 8.
        recall: `eval` holds training rows on purpose: facts to be known by heart.

    Raises:
        RecipeError: The name is empty, too long or not printable.
        DataError: The score does not fit the evaluation rows.
    """

    name: str
    train: Rows = field(repr=False)
    eval: Rows = field(repr=False)
    score: str = ""
    max_new_tokens: int | None = None
    recall: bool = False

    def __post_init__(self) -> None:
        if not self.name.strip() or len(self.name) > LONGEST_NAME or not self.name.isprintable():
            raise RecipeError(
                f"{self.name!r:.100} cannot name a task: a name is 1 to {LONGEST_NAME} printable "
                "characters."
            )
        if (self.train.shape is Shape.LABEL) != (self.eval.shape is Shape.LABEL):
            raise RecipeError(
                f"task {self.name!r} trains on rows of the shape {self.train.shape} and evaluates "
                f"on rows of the shape {self.eval.shape}; with labels, both must have them."
            )
        if not self.score:
            object.__setattr__(self, "score", DEFAULTS[self.eval.shape])
        check_score(self.score, self.eval)

    @property
    def unit(self) -> Unit:
        """The score's unit: share (0 to 1, higher is better) or perplexity (lower is better)."""
        return unit(self.score)

    @property
    def size(self) -> int:
        """Examples it is scored on."""
        return len(self.eval)


class TaskStream:
    """Tasks in the order they are learned.

    Raises:
        RecipeError: No task, or two of the same name.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        names = [task.name for task in tasks]
        if not names:
            raise RecipeError("a stream needs at least one task.")
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise RecipeError(
                f"task {twice[0]!r} is there twice; each task needs a name of its own."
            )
        self._tasks = tuple(tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks)

    def __getitem__(self, i: int) -> Task:
        return self._tasks[i]

    def __repr__(self) -> str:
        return f"TaskStream({', '.join(task.name for task in self)})"

    def leaks(self, *, within: bool = True) -> list[str]:
        """Warn of evaluation rows that some task of the stream is trained on, with their count.

        Args:
            within: Tell of a task's own training rows too, not only of other tasks'.
        """
        return [
            f"{count} of {len(task.eval)} evaluation rows of task {task.name!r} are also among the "
            f"training rows of {'the same task' if other is task else f'task {other.name!r}'}; its "
            "score is too good by what is learned by heart."
            for task in self
            for other in self
            if (other is not task or (within and not task.recall))
            and (count := leaked(other.train, task.eval))
        ]


def learned_by_heart(rows: Rows, tasks: Iterable[Task]) -> int:
    """How many evaluation rows of a guard are also among the training rows of some task."""
    new = set(range(len(rows)))
    for task in tasks:
        new &= set(new_rows(task.train, rows))
    return len(rows) - len(new)


def class_names(listed: Sequence[str], tasks: Sequence[Task]) -> list[str]:
    """The names of all classes: those listed, or all found in the tasks.

    Whole numbers are put in their order, everything else is in the order of sight.
    """
    if listed:
        return list(listed)
    rows = (row for t in tasks for part in (t.train, t.eval) for row in part.rows)
    found = list(dict.fromkeys(str(row["label"]) for row in rows))
    return sorted(found, key=int) if all(map(str.isdecimal, found)) else found
