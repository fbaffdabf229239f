"""A grid of runs: strategies × seeds × orders of the tasks, each in a folder named by its content.

plan ─► jobs that are not done ─► an engine runs them, some at a time ─► one page from the folders

`comparison` measures what the folders hold; this module only sees to it that they are there.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keeptune import engines, report
from keeptune.board import Board
from keeptune.disk import locked, refuse_unwritable
from keeptune.errors import RecipeError
from keeptune.failures import failure, write_failure
from keeptune.guard import Guard
from keeptune.inputs import read_sources
from keeptune.intervals import generator
from keeptune.jobs import Job
from keeptune.recipe import FREE, Recipe, resolve
from keeptune.runs import quiet
from keeptune.strategies import Strategy, read_strategies, strategy_of
from keeptune.stream import Task


@dataclass(frozen=True)
class Compared:
    """What came of a comparison.

    Attributes:
        folder: Where all of it is.
        page: The page; None when no run is finished.
        done: The finished runs.
        failed: Those that failed, and why.
    """

    folder: Path
    page: Path | None
    done: list[Job]
    failed: list[tuple[Job, str]]


def plan(
    recipe: Recipe, out: Path, *, methods: str | None = None, seeds: str = "1", orders: int = 1
) -> list[Job]:
    """All runs of a comparison, each once, checked before any of them begins.

    Args:
        recipe: Model, tasks, guards and trainer of all runs.
        out: Their folders go there.
        methods: Strategies as `read_strategies` takes them; default: plain, and the recipe's own.
        seeds: How many, counted up from the recipe's; or several with commas between them.
        orders: How many orders of the tasks; the first is the recipe's, the others are drawn.

    Raises:
        KeeptuneError: With every problem found, one line each.
    """
    chosen = [*read_strategies(methods or "plain", recipe)]
    chosen += [] if methods else [strategy_of(recipe)]
    numbers = _seeds(seeds, recipe.seed)
    ways = task_orders(len(recipe.tasks), orders)
    with quiet():
        sources = read_sources(recipe)
    jobs: dict[Path, Job] = {}
    for strategy in chosen:
        for number, way in enumerate(ways):
            for seed in numbers:
                suffix = f"-order{number}" * (number > 0)
                job = one_job(recipe, out, sources, strategy, seed, way, suffix)
                title = job.title + f", order {number}" * (orders > 1)
                jobs.setdefault(job.folder, replace(job, title=title))
    return list(jobs.values())


def one_job(
    recipe: Recipe,
    out: Path,
    sources: tuple[Sequence[Task], Sequence[Guard]],
    strategy: Strategy,
    seed: int,
    way: Sequence[int] | None = None,
    suffix: str = "",
) -> Job:
    """One run, in a folder named by all that is in it, so that the same run has the same folder.

    Args:
        recipe: Model, tasks, guards and trainer.
        out: Where its folder goes.
        sources: The data that the recipe names.
        strategy: Its methods.
        seed: Its seed.
        way: The order of the tasks; default: the recipe's.
        suffix: What the folder's name says of the order.
    """
    tasks, guards = sources
    way = range(len(tasks)) if way is None else way
    values = _values(recipe, strategy, seed, way)
    rows = [(tasks[i].train.sha256, tasks[i].eval.sha256) for i in way]
    kept = [guard.rows.sha256 if guard.rows else "" for guard in guards]
    names = "+".join(name for name, _ in strategy.methods) or "plain"
    start = _readable(f"{names}-seed{seed}{suffix}")
    folder = out / f"{start}-{_content([values, rows, kept])}"
    title = f"{strategy.words}, seed {seed}"
    return Job(title, folder, {**values, "out": str(folder)}, Path.cwd())


def task_orders(tasks: int, count: int) -> list[list[int]]:
    """Different orders of so many tasks: first as they are, then drawn, always the same ones.

    Raises:
        RecipeError: There are fewer.
    """
    most = math.factorial(tasks)
    if not 1 <= count <= most:
        raise RecipeError(
            f"--orders {count}: {tasks} task{'s' * (tasks > 1)} can be put into {most} "
            f"order{'s' * (most > 1)}; give a number from 1 to {most}."
        )
    random = generator("orders of tasks", tasks)
    found = [list(range(tasks))]
    while len(found) < count:
        drawn = random.permutation(tasks).tolist()
        if drawn not in found:
            found.append(drawn)
    return found


def _seeds(text: str, first: int) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"\d{1,10}", word) for word in words) or words == ["0"]:
        raise RecipeError(
            f"--seeds {text}: give how many, such as 3 (then {first} to {first + 2}), or the seeds "
            "themselves, such as 3,5,8."
        )
    numbers = [int(word) for word in words]
    if len(numbers) == 1:
        numbers = list(range(first, first + numbers[0]))
    if max(numbers) >= 2**32:
        raise RecipeError(f"--seeds {text}: a seed is less than {2**32}, got {max(numbers)}.")
    return numbers


def _values(recipe: Recipe, strategy: Strategy, seed: int, way: Sequence[int]) -> dict[str, Any]:
    values = resolve(recipe)
    methods = [{name: settings} for name, settings in strategy.methods]
    tasks = [values["tasks"][i] for i in way]
    return {**values, "methods": methods, "seed": seed, "tasks": tasks}


def _content(what: list[Any]) -> str:
    values, *data = what
    fixed = {key: value for key, value in values.items() if key not in FREE}
    text = json.dumps([fixed, *data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _readable(name: str) -> str:
    return re.sub(r"[^\w.+-]", "-", name, flags=re.ASCII)[-80:].lstrip("-.")


def compare(jobs: Sequence[Job], out: Path, board: Board, engine: engines.Engine) -> Compared:
    """Run what is not finished yet, then write the page of all finished runs.

    Args:
        jobs: The runs, as `plan` gives them.
        out: Their folders are there; the page goes there too.
        board: Shows how far they are.
        engine: Runs them.

    Raises:
        KeyboardInterrupt: It was stopped; the same call goes on.
        KeeptuneError: Another process is at work there, or the engine cannot be used.
    """
    refuse_unwritable(out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        failed = run_all(jobs, board, engine)
        done = [job for job in jobs if job.is_done]
        folders = [job.folder for job in [*done, *(job for job, _ in failed)]]
        page = report.write(folders, out / "comparison.html") if done else None
    return Compared(out, page, done, failed)


def run_all(jobs: Sequence[Job], board: Board, engine: engines.Engine) -> list[tuple[Job, str]]:
    """Run what is not finished yet.

    Returns:
        The runs that failed, each with why.

    Raises:
        KeyboardInterrupt: It was stopped; the same call goes on.
    """
    todo = [job for job in jobs if not job.is_done]
    board.begin(todo, len(jobs) - len(todo))
    failed = work_off(todo, board, engine)
    board.close()
    return failed


def work_off(todo: Sequence[Job], board: Board, engine: engines.Engine) -> list[tuple[Job, str]]:
    """Run all of these; of those that fail, why."""
    failed: list[tuple[Job, str]] = []
    with closing(engine(todo, board)) as ends:
        for job, said in ends:
            board.ended(job, said)
            if said is not None:
                failed.append((job, said))
                if failure(job.folder) is None:  # its process could not keep it
                    write_failure(job.folder, said)
    return failed
