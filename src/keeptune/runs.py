"""Start, resume and extend runs: what the command line and notebooks call."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import transformers
from torch import nn

from keeptune.errors import DataError, FolderError, KeeptuneError, RecipeError
from keeptune.folder import RunFolder, RunInfo, write_atomic
from keeptune.guard import Guard
from keeptune.loop import Loop
from keeptune.machine import provenance
from keeptune.method import Chain, Method
from keeptune.models import Loaded
from keeptune.progress import Progress, Silent
from keeptune.recipe import Recipe, dump, load_recipe, parse_recipe, resolve
from keeptune.rows import read_rows
from keeptune.session import DEFAULT_LENGTH, Plan, Session, class_names, open_session, read_plan
from keeptune.stream import Task, TaskStream

# What may differ when a run goes on: where and how fast, never what is learned.
FREE = ("tasks", "out", "checkpoint_minutes", "eval_batch_size")


def run(recipe: Recipe, *, resume: bool = False, progress: Progress | None = None) -> RunFolder:
    """Run a recipe.

    Args:
        recipe: With `out` set.
        resume: Go on in a folder that a former run left.
        progress: Who is told; nobody by default.

    Returns:
        The finished run folder.

    Raises:
        KeeptuneError: Anything a user can mend; nothing is lost.
    """
    out = _out(recipe)
    existing = RunFolder(out) if resume and (out / "run.json").exists() else None
    if existing is None:
        _refuse_full(out)
    else:
        recipe = _same_recipe(existing, recipe)
    with _quiet():
        session = open_session(read_plan(recipe))
    folder = existing or RunFolder.create(out, describe(session, recipe), dump(recipe))
    if existing is not None:
        _same_data(existing, session)
    return _finish(session, folder, progress or Silent())


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
    folder = RunFolder(path)
    recipe = load_recipe(folder.path / "recipe.yaml")
    task = {"name": name, "train": data, "eval": eval or data, "score": score}
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
    with _quiet():
        session = open_session(read_plan(recipe))
    _same_data(folder, session)
    info = describe(session, recipe)
    write_atomic(folder.path / "recipe.yaml", dump(recipe).encode())
    folder.info = folder.info.model_copy(
        update={"tasks": info.tasks, "warnings": info.warnings, "status": "running"}
    )
    folder.save_info()
    loop = Loop(session, folder, progress or Silent(), threading.Event())
    # The base model is loaded now and never again: its answers on the new task are row 0.
    loop.evaluate(0)
    return _finish(session, folder, progress or Silent(), loop)


def _is_unfinished(folder: RunFolder, name: str) -> bool:
    return folder.info.status != "done" and folder.info.tasks[-1].name == name


@dataclass
class Inspection:
    """What a recipe would do.

    Attributes:
        lines: What would be trained, in words.
        problems: Every problem found; empty when the recipe can run.
    """

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def inspect(recipe: Recipe) -> Inspection:
    """Load everything a recipe names, tokenise its rows, and say what it would do."""
    found = Inspection()
    try:
        with _quiet():
            session = open_session(read_plan(recipe))
    except KeeptuneError as error:
        found.problems = str(error).splitlines()
        return found
    info = session.model_info()
    found.lines = [
        f"model     {info['name']}: {info['parameters']:,} weights, "
        f"{info['trainable']:,} of them trained ({info['adapter']})",
        f"strategy  {session.chain.name}",
        f"memory    about {_memory(info) / 2**30:.1f} GiB for weights, gradients and optimizer, "
        "and what one batch needs on top",
    ]
    for task in session.data_infos():
        cut = f", {task.truncated_rows} cut to {session.plan.max_length}" * bool(
            task.truncated_rows
        )
        cut += f", {task.dropped_rows} left out" * bool(task.dropped_rows)
        found.lines.append(
            f"task      {task.name}: {task.train_rows:,} rows, {task.train_tokens:,} tokens{cut}; "
            f"{task.eval_rows:,} to evaluate by {task.score}"
        )
    found.lines += [
        f"guard     {g.name}: {g.eval_rows:,} to evaluate by {g.score}"
        for g in session.guard_infos()
    ]
    found.lines += [f"warning   {warning}" for warning in session.plan.stream.leaks()]
    return found


def _memory(info: dict[str, Any]) -> int:
    # float32 weights, one gradient and Adam's two moments for each trained one.
    return 4 * int(info["parameters"]) + 12 * int(info["trainable"])


# -- notebooks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """What `fit` gives back.

    Attributes:
        model: After the last task, with its adapter if any.
        folder: The run folder.
    """

    model: nn.Module
    folder: RunFolder


def fit(
    model: nn.Module,
    tasks: Mapping[str, tuple[Any, Any]],
    *,
    tokenizer: Any,
    out: str | Path,
    methods: Sequence[Method] = (),
    guards: Mapping[str, Any] | None = None,
    adapter: Any = None,
    **settings: Any,
) -> Fitted:
    """Learn tasks one after another with model and data objects, without a recipe.

    Example:
        fitted = fit(model, {"a": (train_a, test_a)}, tokenizer=tok, methods=[EWC()], out="runs/a")

    Args:
        model: A transformers model, causal or for sequence classification.
        tasks: Name to (training rows, evaluation rows): lists of dictionaries, data sets, paths.
        tokenizer: The model's.
        out: A new folder for the run.
        methods: The strategy; empty is plain fine-tuning.
        guards: Name to evaluation rows that must not get worse.
        adapter: A PEFT config; None trains all weights.
        **settings: `trainer`, `seed`, `max_length`, `eval_batch_size`, `checkpoint_minutes`,
            `progress`, each as in a recipe.

    Raises:
        KeeptuneError: Anything a user can mend.
    """
    allowed = {
        "trainer", "seed", "max_length", "eval_batch_size", "checkpoint_minutes", "progress",
    }  # fmt: skip
    if unknown := set(settings) - allowed:
        raise RecipeError(f"fit has no setting {sorted(unknown)[0]!r}. Allowed: {sorted(allowed)}.")
    progress = settings.pop("progress", None) or Silent()
    out = Path(out)
    _refuse_full(out)
    stream = TaskStream(
        [Task(name, read_rows(train), read_rows(test)) for name, (train, test) in tasks.items()]
    )
    kept = [Guard(name, read_rows(rows)) for name, rows in (guards or {}).items()]
    plan = _plan(model, tokenizer, stream, kept, methods, adapter, settings)
    with _quiet():
        session = open_session(plan)
    recipe = _described(plan, settings)
    folder = RunFolder.create(out, describe(session, recipe), dump(recipe))
    return Fitted(session.model, _finish(session, folder, progress))


def _plan(
    model: nn.Module,
    tokenizer: Any,
    stream: TaskStream,
    guards: list[Guard],
    methods: Sequence[Method],
    adapter: Any,
    settings: dict[str, Any],
) -> Plan:
    is_classifier = stream[0].train.shape.value == "label"
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "")) or "in memory"
    plan = Plan(
        loaded=Loaded(model=model, tokenizer=tokenizer, name=name, source="object", identity=""),
        stream=stream,
        guards=guards,
        methods=list(methods),
        kind="classification" if is_classifier else "causal_lm",
        adapter=adapter,
        labels=class_names([], list(stream)) if is_classifier else [],
        settings=dict(settings.get("trainer", {})),
        max_length=settings.get("max_length") or DEFAULT_LENGTH,
    )
    for key in ("seed", "eval_batch_size", "checkpoint_minutes"):
        if key in settings:
            setattr(plan, key, settings[key])
    return plan


def _described(plan: Plan, settings: dict[str, Any]) -> Recipe:
    """The recipe that says what `fit` was given, for the run folder."""
    return parse_recipe(
        {
            **settings,
            "model": plan.loaded.name,
            "kind": plan.kind,
            "adapter": {"kind": plan.adapter.peft_type.value.lower()} if plan.adapter else "none",
            "labels": plan.labels,
            "tasks": [
                {"name": t.name, "train": t.train.source, "eval": t.eval.source, "score": t.score}
                for t in plan.stream
            ],
            "methods": [{m.name(): m.model_dump(mode="json")} for m in plan.methods],
        }
    )


# -- shared ---------------------------------------------------------------------------------------


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
        provenance=provenance(),
        warnings=session.plan.stream.leaks(),
    )


def identity(recipe: Recipe) -> str:
    """Hash of everything in a recipe that must not change when its run goes on."""
    fixed = {k: v for k, v in resolve(recipe).items() if k not in FREE}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _out(recipe: Recipe) -> Path:
    if recipe.out is None:
        raise RecipeError("out: no run folder is given. Set `out:` in the recipe or use --out.")
    return recipe.out


def _refuse_full(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FolderError(
            f"{out} is not empty. Continue that run with --resume, or give another --out."
        )


def _same_recipe(folder: RunFolder, recipe: Recipe) -> Recipe:
    """The folder's own recipe (it may have learned more tasks since), if this one began it."""
    own = load_recipe(folder.path / "recipe.yaml")
    if identity(recipe) != folder.info.recipe_sha256:
        mine, theirs = resolve(recipe), resolve(own)
        changed = [k for k in mine if k not in FREE and mine[k] != theirs.get(k)]
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


def _same_data(folder: RunFolder, session: Session) -> None:
    for then, now in zip(folder.info.tasks, session.data_infos(), strict=False):
        for key in ("train_sha256", "eval_sha256"):
            if getattr(then, key) != getattr(now, key):
                raise DataError(
                    f"The {key.partition('_')[0]} rows of task {then.name!r} changed since "
                    f"{folder.path} was started. Put the old file back, or give another --out."
                )


def _finish(
    session: Session, folder: RunFolder, progress: Progress, loop: Loop | None = None
) -> RunFolder:
    for warning in folder.info.warnings:
        progress.warn(warning)
    loop = loop or Loop(session, folder, progress, threading.Event())
    try:
        with _quiet(), _stopping(loop.stop, progress):
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
def _quiet() -> Iterator[None]:
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
