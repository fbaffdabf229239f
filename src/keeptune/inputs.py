"""The data that a recipe names: tasks and guards, read and checked before any model is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from keeptune.errors import DataError, KeeptuneError, RecipeError, suggest
from keeptune.guard import Guard, read_guard
from keeptune.recipe import Recipe
from keeptune.recipe_checks import check_recipe
from keeptune.recipe_parts import TaskRecipe
from keeptune.rows import Rows, Shape, label_id, read_rows
from keeptune.stream import Task, class_names
from keeptune.validation import hold_out, sampled


class Problems:
    """Collects every problem instead of stopping at the first."""

    def __init__(self) -> None:
        self.found: list[KeeptuneError] = []

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Keep a KeeptuneError and go on."""
        try:
            yield
        except KeeptuneError as error:
            self.found.append(error)

    def raise_all(self) -> None:
        """Raise what was found: one error as it is, several as one, a line each."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise RecipeError("\n".join(str(error) for error in self.found))


def read_sources(recipe: Recipe) -> tuple[list[Task], list[Guard]]:
    """Check a recipe and read the data it names; no model is loaded.

    Raises:
        KeeptuneError: With every problem found, one line each.
    """
    problems = Problems()
    with problems.collect():
        check_recipe(recipe)
    tasks: list[Task] = []
    for number, task in enumerate(recipe.tasks):
        with problems.collect():
            tasks.append(read_task(task, where=recipe.where("tasks", number)))
    guards: list[Guard] = []
    for number, guard in enumerate(recipe.guards):
        with problems.collect():
            guards.extend(read_guard(guard, where=recipe.where("guards", number)))
    for check in (_check_names, _check_shapes, _check_labels, _check_transfer, _check_lm_eval):
        with problems.collect():
            check(recipe, tasks, guards)
    if recipe.validation is not None:
        whole, tasks = tasks, []
        for each in whole:
            with problems.collect():
                tasks.append(hold_out(each, recipe.validation))
        guards = [sampled(guard, recipe.validation) for guard in guards]
    problems.raise_all()
    return tasks, guards


def read_task(spec: TaskRecipe, *, where: str) -> Task:
    """Load one task of a recipe.

    Raises:
        DataError: A file cannot be read, or the score does not fit its rows.
    """
    return Task(
        name=spec.name,
        train=read_rows(spec.train, split="train", field=f"{where}.train"),
        eval=read_rows(spec.eval, split="test", field=f"{where}.eval"),
        score=spec.score or "",
        max_new_tokens=spec.max_new_tokens,
        recall=spec.recall,
    )


def _check_names(recipe: Recipe, tasks: Sequence[Task], guards: Sequence[Guard]) -> None:
    """Names must differ when groups of ready-made guards are written out, too."""
    seen = {task.name: "a task" for task in tasks}
    for guard in guards:
        if guard.name in seen:
            raise RecipeError(
                f"guards: {guard.name!r} is the name of {seen[guard.name]} and of a guard. Give "
                "one of your own another name; `facts` is a group of several guards."
            )
        seen[guard.name] = "a guard"


def _check_shapes(recipe: Recipe, tasks: Sequence[Task], guards: Sequence[Guard]) -> None:
    parts: list[tuple[str, Rows | None]] = [(f"Task {task.name!r}", task.train) for task in tasks]
    parts += [(f"Guard {guard.name!r}", guard.rows) for guard in guards]
    for name, rows in parts:
        shape = "lm-eval" if rows is None else rows.shape.value
        if (shape == Shape.LABEL) != (recipe.kind == "classification"):
            raise DataError(
                f"{name} has rows of the shape {shape!r}, which `kind: {recipe.kind}` cannot "
                "answer. Use `kind: classification` for text + label rows, and causal_lm for all "
                "others."
            )


def _check_transfer(recipe: Recipe, tasks: Sequence[Task], guards: Sequence[Guard]) -> None:
    names = [task.name for task in tasks]
    for guard in guards:
        if guard.transfer_of and guard.transfer_of not in names:
            raise RecipeError(
                f"guards: {guard.name!r} has transfer_of: {guard.transfer_of}, but no task is "
                f"called so. {suggest(guard.transfer_of, names)}"
            )


def _check_lm_eval(recipe: Recipe, tasks: Sequence[Task], guards: Sequence[Guard]) -> None:
    for guard in guards:
        if guard.rows is None:
            from keeptune.harness import task_manager

            task_manager(guard)


def _check_labels(recipe: Recipe, tasks: Sequence[Task], guards: Sequence[Guard]) -> None:
    """Each label must be a class before anything is trained."""
    parts = [rows for task in tasks for rows in (task.train, task.eval)]
    parts += [guard.rows for guard in guards if guard.rows is not None]
    labelled = [rows for rows in parts if rows.shape is Shape.LABEL]
    labels = class_names(recipe.labels, tasks) if labelled == parts else []
    for rows in labelled if labels else ():
        for number, row in enumerate(rows.rows, 1):
            try:
                label_id(row["label"], labels)
            except DataError as error:
                raise DataError(f"row {number} of {rows.source}: {error}") from error
