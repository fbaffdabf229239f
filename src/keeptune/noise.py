"""How much a run's numbers vary by chance: scored again, on other examples, under other seeds.

a finished run ─► the same weights in other batches ─► its recipe under other seeds ─► noise.json

What `floors` makes of that is the smallest difference that means something.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from threading import Event

import numpy as np

from keeptune import engines
from keeptune.board import Board
from keeptune.compare import one_job, run_all
from keeptune.disk import locked
from keeptune.errors import DataError, FolderError, ModelError
from keeptune.folder import RunFolder
from keeptune.guard import Guard
from keeptune.intervals import Array
from keeptune.jobs import Job
from keeptune.loop import Loop
from keeptune.metrics import DEFINITIONS, applies, key_of, raw
from keeptune.progress import Progress, duration
from keeptune.recipe import Recipe, in_one_process, load_recipe
from keeptune.records import Kind, Measure, Noise, Spread, Unit
from keeptune.results import Column, Results, load
from keeptune.runs import DIVISION, quiet, refuse_objects
from keeptune.session import Session, open_session, read_plan
from keeptune.strategies import strategy_of
from keeptune.stream import Task
from keeptune.units import UNITS

Again = Mapping[tuple[Kind, int], Sequence[float]]


@dataclass(frozen=True)
class Measured:
    """What came of it.

    Attributes:
        folder: The run; it keeps the record.
        noise: The record.
        seeds_in: Where the runs of the other seeds are.
        failed: Those that failed, and why.
    """

    folder: RunFolder
    noise: Noise
    seeds_in: Path
    failed: list[tuple[Job, str]]


def measure(
    path: Path, seeds: int, *, board: Board, engine: engines.Engine, progress: Progress
) -> Measured:
    """Measure how much a finished run's numbers vary by chance, and keep it in its folder.

    Args:
        path: The run folder; only noise.json in it is written.
        seeds: How many other seeds its recipe is run under; those that are finished already, by
            this or by `compare`, are not run again.
        board: Shows how far those runs are.
        engine: Runs them.
        progress: Is told of the scoring.

    Raises:
        KeyboardInterrupt: It was stopped; the same call goes on.
        KeeptuneError: Anything a user can mend; nothing is lost.
    """
    folder = RunFolder(path.resolve())
    refuse_objects(folder, "Measure the noise of a run by `keeptune run`.", what="model and data")
    if folder.info.status != "done":
        raise FolderError(
            f"{path} is not finished (status: {folder.info.status}), so its noise cannot be "
            "measured. Finish it with `keeptune run RECIPE --resume`."
        )
    folder.require_state()
    recipe = in_one_process(load_recipe(folder.path / "recipe.yaml"))
    # A run at work in the folder keeps files there, which loading its state would clear away.
    with locked(folder.path), quiet():
        session = open_session(read_plan(recipe))
        _refuse_moved(folder, session)
        tasks, guards = list(session.plan.stream), session.plan.guards
        jobs = other_seeds(folder, recipe, tasks, guards, seeds)
        progress.note(price(folder, sum(not job.is_done for job in jobs)))
        sizes, again = score_again(session, folder, progress)
    del session
    failed: list[tuple[Job, str]] = []
    if jobs:
        jobs[0].folder.parent.mkdir(exist_ok=True)
        with locked(jobs[0].folder.parent):
            failed = run_all(jobs, board, engine)
    others = [RunFolder(job.folder) for job in jobs if job.is_done]
    for other in others:
        _refuse_other_weights(
            folder, str(other.info.model.get("identity")), f"those of {other.path}"
        )
    noise = Noise(
        tasks=len(tasks),
        seeds=[run.info.seed for run in (folder, *others)],
        batch_sizes=[recipe.eval_batch_size, *sizes],
        spreads=spreads([load(run) for run in (folder, *others)], again),
    )
    folder.write_noise(noise)
    return Measured(folder, noise, jobs[0].folder.parent if jobs else folder.path, failed)


def _refuse_moved(folder: RunFolder, session: Session) -> None:
    """Refuse data or weights other than those that the run had."""
    now = (*session.data_infos(), *session.guard_infos())
    for was, data in zip((*folder.info.tasks, *folder.info.guards), now, strict=True):
        # What was forgotten may be gone from the data too.
        is_shorter = folder.info.forget_requests and data.train_rows <= was.train_rows
        changed = ["training"] if data.train_sha256 != was.train_sha256 and not is_shorter else []
        changed += ["evaluation"] if data.eval_sha256 != was.eval_sha256 else []
        if changed:
            raise DataError(
                f"The {changed[0]} rows of {was.name!r} changed since {folder.path} was run, so "
                "that its recipe would not give the same run again. Put the old file back."
            )
    _refuse_other_weights(folder, session.plan.loaded.identity, "those found now")


def _refuse_other_weights(folder: RunFolder, identity: str, whose: str) -> None:
    if (was := folder.info.model.get("identity")) != identity:
        raise ModelError(
            f"{folder.path} was trained from other weights of {folder.info.model['name']} ({was}) "
            f"than {whose} ({identity}). Put the old model back."
        )


def price(folder: RunFolder, runs: int) -> str:
    """What measuring will take, by what the run took."""
    one = sum(phase.seconds for phase in folder.cost().phases)
    cells = [column.cells[-1] for r in [load(folder)] for column in (*r.tasks, *r.guards)]
    scoring = sum(cell.seconds for cell in cells if cell)
    more = f", and {runs} more run{'s' * (runs > 1)} of about {duration(one)} each" if runs else ""
    return f"scoring again, about {duration(2 * scoring)}{more}"


# -- the same weights -----------------------------------------------------------------------------


def score_again(session: Session, folder: RunFolder, progress: Progress) -> tuple[list[int], Again]:
    """Score the run's last state in batches of other sizes, which changes the order of sums.

    Returns:
        The sizes, and for each task and guard its goodness in each.
    """
    loop = Loop(session, folder, progress, Event())
    ctx = session.context(loop.load_last_state() - 1)
    items: list[tuple[Kind, int, Task | Guard]] = []
    items += [("task", i, task) for i, task in enumerate(session.plan.stream)]
    items += [("guard", i, guard) for i, guard in enumerate(session.plan.guards)]
    sizes = other_sizes(session.plan.eval_batch_size)
    found: dict[tuple[Kind, int], list[float]] = {(kind, i): [] for kind, i, _ in items}
    total = len(sizes) * sum(item.size for *_, item in items)
    progress.phase("score again", total, "examples")
    for size in sizes:
        session.plan.eval_batch_size = size
        for kind, i, item in items:
            cell = loop.score(item, ctx, item.name if kind == "task" else None)
            found[kind, i].append(cell.score if cell.unit == "share" else -math.log(cell.score))
    progress.close()
    return sizes, found


def other_sizes(size: int) -> list[int]:
    """Half as many rows at a time, and one more: neither takes much more memory."""
    return sorted({max(1, size // 2), size + 1} - {size})


# -- other seeds ----------------------------------------------------------------------------------


def other_seeds(
    folder: RunFolder, recipe: Recipe, tasks: Sequence[Task], guards: Sequence[Guard], count: int
) -> list[Job]:
    """The run's recipe under the seeds after its own.

    They stand beside the run where `compare` made it, so that its runs count; else in a folder
    named after it.
    """
    accumulated = recipe.trainer.get(key := "gradient_accumulation_steps", DIVISION[key])
    rows = {key: accumulated * folder.info.provenance.get("processes", 1)}  # in one process
    if rows[key] != accumulated:
        recipe = recipe.model_copy(update={"trainer": recipe.trainer | rows})
    strategy, place = strategy_of(recipe), folder.path.parent
    order = re.search(r"-seed\d+(-order\d+)-", folder.path.name)

    def job(seed: int, place: Path) -> Job:
        suffix = order[1] if order else ""
        return one_job(recipe, place, (tasks, guards), strategy, seed, suffix=suffix)

    if job(recipe.seed, place).folder != folder.path:
        place = place / f"{folder.path.name}-seeds"
    return [job((recipe.seed + i) % 2**32, place) for i in range(1, count + 1)]


# -- together -------------------------------------------------------------------------------------


def spreads(runs: Sequence[Results], again: Again) -> list[Spread]:
    """How much each task's and guard's score at the end varies, and each metric.

    Args:
        runs: The run, then those of other seeds.
        again: Of each task and guard of the run, its goodness in other batches.
    """
    found = _of_columns("task", [run.tasks for run in runs], again)
    found += _of_columns("guard", [run.guards for run in runs], again)
    for unit in UNITS:
        for definition in DEFINITIONS:
            if applies(runs[0], definition, unit):
                key = key_of(definition, unit)
                found.append(_spread("metric", key, unit, [raw(r, definition, unit) for r in runs]))
    return [spread for spread in found if spread is not None]


def _of_columns(kind: Kind, runs: Sequence[Sequence[Column]], again: Again) -> list[Spread | None]:
    """Of each task or guard its score at the end, what it gained, and how it changed since."""
    found: list[Spread | None] = []
    for i, column in enumerate(runs[0]):
        of, last = (column.info.name, column.info.unit), len(column.cells) - 1
        own = i + 1 if kind == "task" else 0
        ends = [(float(run[i].goodness[last]), run[i].draws[:, last]) for run in runs]
        found.append(_spread(kind, *of, ends, [ends[0][0], *again.get((kind, i), ())]))
        if own:
            found.append(_spread("gain", *of, [_change(run[i], 0, own) for run in runs]))
        if own < last:
            found.append(_spread("change", *of, [_change(run[i], own, last) for run in runs]))
    return found


def _change(column: Column, since: int, row: int) -> tuple[float, Array]:
    goodness, draws = column.goodness, column.draws
    return float(goodness[row] - goodness[since]), draws[:, row] - draws[:, since]


def _spread(
    kind: Measure,
    name: str,
    unit: Unit,
    ends: Sequence[tuple[float, Array]],
    again: Sequence[float] = (),
) -> Spread | None:
    """One number over all runs; None where it is not defined in each."""
    values = [value for value, _ in ends]
    if not np.isfinite(values).all():
        return None
    draws = [drawn for _, drawn in ends]
    gaps = [_error(one - other) for one, other in combinations(draws, 2)]
    return Spread(
        kind=kind,
        name=name,
        unit=unit,
        again=list(again),
        seeds=values,
        examples=_error(draws[0]),
        paired=math.sqrt(sum(gap**2 for gap in gaps) / len(gaps)) if gaps else None,
    )


def _error(draws: Array) -> float:
    """The standard error that bootstrap draws show."""
    known = draws[np.isfinite(draws)]
    return float(known.std(ddof=1)) if len(known) > 1 else 0.0
