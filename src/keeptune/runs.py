"""Start, resume and extend runs: what the command line and notebooks call."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import transformers

from keeptune.chain import Chain
from keeptune.disk import locked, write_atomic
from keeptune.errors import DataError, FolderError, ModelError, RecipeError
from keeptune.failures import clear_failure
from keeptune.folder import ReadOnlyFolder, RunFolder, refuse_full
from keeptune.loop import Loop
from keeptune.machine import provenance
from keeptune.processes import first_says, is_first, launched
from keeptune.progress import Progress, Silent
from keeptune.recipe import FREE, Recipe, dump, load_recipe, parse_recipe, resolve
from keeptune.records import DataInfo, Kind, Phase, RunInfo
from keeptune.session import Session, open_session, read_plan

OBJECT = "object"  # the source of a model that was given as an object
# What may differ when a run goes on, never what is learned; tasks may be added.
MAY_DIFFER = ("tasks", *FREE)
# How the rows of a step are divided; their number is what is learned from. With the defaults.
DIVISION = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


def run(
    recipe: Recipe,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    row_0: RunFolder | None = None,
) -> RunFolder:
    """Run a recipe.

    Args:
        recipe: With `out` set.
        resume: Go on in a folder that a former run left.
        progress: Who is told; nobody by default.
        row_0: A run that differs in methods or trainer settings only: its scores before
            training are taken over.

    Returns:
        The finished run folder.

    Raises:
        KeeptuneError: Anything a user can mend; nothing is lost.
    """
    out = _out(recipe)
    existing = _opened(out) if resume and (out / "run.json").exists() else None
    if existing is None:
        refuse_full(out)
    else:
        recipe = _same_recipe(existing, recipe)
    started = time.monotonic()
    with quiet():
        session = open_session(read_plan(recipe))
    folder = existing or start(out, session, recipe)
    if existing is not None:
        _same_data(existing, session)
    with _alone(folder.path):
        clear_failure(folder.path)
        folder.add_phase(Phase(phase="load", seconds=time.monotonic() - started))
        if row_0 is not None:
            take_row_0(folder, row_0)
        return finish(session, folder, progress or Silent())


def learn(
    path: Path,
    data: str,
    *,
    name: str,
    eval: str | None = None,
    score: str | None = None,
    progress: Progress | None = None,
) -> RunFolder:
    """Learn one more task in a finished run folder; R grows by a row and a column.

    The same call again goes on where a killed one stopped.

    Args:
        path: The run folder.
        data: Training rows.
        name: The task's name.
        eval: Evaluation rows; without them the training rows are scored, as recall.
        score: As in a recipe.
        progress: Who is told.

    Raises:
        KeeptuneError: Anything a user can mend; nothing is lost.
    """
    folder = _opened(path)
    refuse_objects(folder, "Call keeptune.fit with the new task instead.")
    folder.require_state()
    recipe = load_recipe(folder.path / "recipe.yaml")
    task = {"name": name, "train": data, "eval": eval or data, "score": score, "recall": not eval}
    names = [t.name for t in recipe.tasks]
    if name in names[: len(folder.info.tasks)] and not _is_unfinished(folder, name):
        raise FolderError(
            f"{path} has learned a task {name!r} already. Give the new one another --name."
        )
    if folder.info.status != "done" and name not in names:
        raise FolderError(
            f"{path} is not finished (it has the status {folder.info.status!r}). "
            "Finish it first with `keeptune run RECIPE --resume`."
        )
    if name not in names:
        values = resolve(recipe)
        recipe = parse_recipe({**values, "tasks": [*values["tasks"], task]})
    with quiet():
        session = open_session(read_plan(recipe))
    _same_data(folder, session)
    with _alone(folder.path):
        info = describe(session, recipe)
        if is_first():
            write_atomic(folder.path / "recipe.yaml", dump(recipe).encode())
        folder.info = folder.info.model_copy(
            update={"tasks": info.tasks, "warnings": info.warnings, "status": "running"}
        )
        folder.save_info()
        loop = Loop(session, folder, progress or Silent(), threading.Event())
        # The base model is loaded now and never again: its answers on the new task are row 0.
        loop.evaluate(0)
        return finish(session, folder, progress or Silent(), loop)


def _is_unfinished(folder: RunFolder, name: str) -> bool:
    return folder.info.status != "done" and folder.info.tasks[-1].name == name


# -- shared ---------------------------------------------------------------------------------------


def refuse_objects(folder: RunFolder, instead: str, *, what: str = "model") -> None:
    """Refuse a run whose model cannot be loaded again.

    Args:
        folder: The run.
        instead: What can be done.
        what: What would be loaded.

    Raises:
        FolderError: It was made from objects.
    """
    if folder.info.model.get("source") == OBJECT:
        raise FolderError(
            f"{folder.path} was made from objects in a notebook, so its {what} cannot be loaded "
            f"again. {instead}"
        )


def describe(session: Session, recipe: Recipe) -> RunInfo:
    """run.json of a run that starts now."""
    return RunInfo(
        seed=recipe.seed,
        strategy=Chain(session.plan.methods).name,
        recipe_sha256=identity(recipe),
        model=session.model_info(),
        tasks=session.data_infos(),
        guards=session.guard_infos(),
        methods=session.method_infos(),
        provenance=provenance() | {"processes": launched()},
        # A task's own leak is a figure of the task, and a check of the report.
        warnings=session.plan.stream.leaks(within=False),
    )


def identity(recipe: Recipe) -> str:
    """Hash of everything in a recipe that must not change when its run goes on."""
    fixed = {k: v for k, v in resolve(recipe).items() if k not in MAY_DIFFER}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def start(out: Path, session: Session, recipe: Recipe) -> RunFolder:
    """A new run folder; of several processes the first one makes it.

    Raises:
        FolderError: The folder holds something already.
    """
    if is_first():
        RunFolder.create(out, describe(session, recipe), dump(recipe))
    first_says(None)  # it is there
    return _opened(out)


def _opened(path: Path) -> RunFolder:
    return RunFolder(path) if is_first() else ReadOnlyFolder(path)


def _alone(path: Path) -> AbstractContextManager[None]:
    """Keep other runs out of a folder, for all processes of this one."""
    return locked(path) if is_first() else nullcontext()


def take_row_0(folder: RunFolder, other: RunFolder) -> None:
    """Take over what another run measured before training; nothing where anything differs."""
    mine, others = (resolve(load_recipe(f.path / "recipe.yaml")) for f in (folder, other))
    learning = ("methods", "trainer", "watch", "budget", "out", "checkpoint_minutes")
    if any(mine[key] != others[key] for key in mine if key not in learning):
        return
    if folder.info.model["identity"] != other.info.model["identity"]:
        return
    kinds: tuple[Kind, Kind] = ("task", "guard")
    for kind in kinds:
        theirs = {_evaluation(d): i for i, d in enumerate(_columns(other, kind))}
        for index, data in enumerate(_columns(folder, kind)):
            found = theirs.get(_evaluation(data))
            cell = other.cell(0, kind, found) if found is not None else None
            if cell is not None and folder.cell(0, kind, index) is None:
                folder.write_cell(0, kind, index, cell)


def _columns(folder: RunFolder, kind: Kind) -> list[DataInfo]:
    return folder.info.tasks if kind == "task" else folder.info.guards


def _evaluation(data: DataInfo) -> tuple[str, str, str]:
    return data.name, data.score, data.eval_sha256


def _out(recipe: Recipe) -> Path:
    if recipe.out is None:
        raise RecipeError("out: no run folder is given. Set `out:` in the recipe or use --out.")
    return recipe.out


def _same_recipe(folder: RunFolder, recipe: Recipe) -> Recipe:
    """The folder's own recipe (it may have learned more tasks since), if this one began it."""
    own = load_recipe(folder.path / "recipe.yaml")
    rows = _rows_in_step(recipe, launched())
    if (then := _rows_in_step(own, folder.info.provenance.get("processes", 1))) != rows:
        raise FolderError(
            f"{folder.path} was started with {then} rows in a step, and would go on with {rows}. "
            "Start as many processes as then, or change trainer.per_device_train_batch_size or "
            "trainer.gradient_accumulation_steps until it is the same."
        )
    division = _division(recipe)
    own, recipe = (r.model_copy(update={"trainer": r.trainer | division}) for r in (own, recipe))
    if identity(recipe) != identity(own):
        mine, theirs = resolve(recipe), resolve(own)
        changed = [k for k in mine if k not in MAY_DIFFER and mine[k] != theirs.get(k)]
        raise FolderError(
            f"{folder.path} belongs to another recipe: {', '.join(changed)} differ. "
            "Resume with the recipe it was started with, or give another --out."
        )
    mine, theirs = resolve(recipe)["tasks"], resolve(own)["tasks"]
    if theirs[: len(mine)] != mine:
        raise FolderError(
            f"{folder.path} belongs to another recipe: its tasks differ. "
            "Resume with the recipe it was started with, or give another --out."
        )
    return own


def _division(recipe: Recipe) -> dict[str, Any]:
    return {key: recipe.trainer.get(key, default) for key, default in DIVISION.items()}


def _rows_in_step(recipe: Recipe, processes: int) -> int:
    return processes * int(math.prod(_division(recipe).values()))


def _same_data(folder: RunFolder, session: Session) -> None:
    was, found = folder.info.model.get("identity"), session.plan.loaded.identity
    if was and found and was != found:
        raise ModelError(
            f"The weights of {folder.info.model['name']} changed since {folder.path} was started "
            f"({was} then, {found} now). Put the old model back, or give another --out."
        )
    for then, now in zip(folder.info.tasks, session.data_infos(), strict=False):
        # What was forgotten may be gone from the data too. Results name evaluation rows by their
        # number, so that none of these may be missing.
        is_shorter = now.train_rows <= then.train_rows and now.eval_rows == then.eval_rows
        if folder.info.forget_requests and is_shorter:
            continue
        for key in ("train_sha256", "eval_sha256"):
            if getattr(then, key) != getattr(now, key):
                raise DataError(
                    f"The {key.partition('_')[0]} rows of task {then.name!r} changed since "
                    f"{folder.path} was started. Put the old file back, or give another --out."
                )


def finish(
    session: Session, folder: RunFolder, progress: Progress, loop: Loop | None = None
) -> RunFolder:
    """Run what is left to run, with Ctrl-C saving a state first."""
    for warning in session.plan.stream.leaks():
        progress.warn(warning)
    loop = loop or Loop(session, folder, progress, threading.Event())
    try:
        with quiet(), _stopping(loop.stop, progress):
            loop.run()
    finally:
        progress.close()
    return folder


@contextmanager
def _stopping(stop: threading.Event, progress: Progress) -> Iterator[None]:
    """Ctrl-C (and SIGTERM) saves a state first; a second one stops at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        progress.note("stopping: a state is saved after this step (again to stop at once)")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' own bars and remarks; keeptune says what matters."""
    log = transformers.logging
    level, loading = log.get_verbosity(), log.is_progress_bar_enabled()
    mapping = not datasets.are_progress_bars_disabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if loading:
            log.enable_progress_bar()
        if mapping:
            datasets.enable_progress_bars()
