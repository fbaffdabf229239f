"""Settings searched for: trials on held-out training rows, and those that none beats.

a recipe, ranges ─► what to try next, by Optuna ─► run ─► learned, kept ─► ... ─► front, knee

Only finished trials are in the journal. What comes next follows from them alone, so that after a
kill the same trial is proposed again, and its run goes on in the folder that its content names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keeptune import engines, report
from keeptune.bargains import Trial, chosen, objectives
from keeptune.board import Board
from keeptune.compare import one_job, work_off
from keeptune.disk import locked, refuse_unwritable, write_atomic
from keeptune.errors import KeeptuneError, RecipeError
from keeptune.folder import RunFolder
from keeptune.guard import Guard
from keeptune.inputs import read_sources
from keeptune.jobs import Job
from keeptune.recipe import FREE, Recipe, dump, load_recipe, resolve
from keeptune.results import load
from keeptune.runs import quiet
from keeptune.search import Range, assignment, own_values, read_search
from keeptune.strategies import strategy_of
from keeptune.stream import Task

if TYPE_CHECKING:
    import optuna

SHARE = 0.2  # of the training rows
FIRST = 5  # trials drawn before what they showed decides
JOURNAL, TRIALS, KNEE = "trials.log", "trials.json", "knee.yaml"


@dataclass(frozen=True)
class Tuned:
    """What came of a search.

    Attributes:
        trials: All, in the order in which they were proposed.
        recipe: The recipe at the knee.
        page: The report of the front.
    """

    trials: list[Trial]
    recipe: Path
    page: Path


@dataclass(frozen=True)
class Plan:
    """A search, checked.

    Attributes:
        path: The recipe's file.
        overrides: What is changed in it for all trials, without what is held out.
        recipe: The recipe of all trials but for what is searched.
        ranges: What is searched.
        sources: The data, divided.
    """

    path: Path
    overrides: list[str]
    recipe: Recipe
    ranges: list[Range]
    sources: tuple[list[Task], list[Guard]]

    def changed(self, values: Sequence[float]) -> list[str]:
        """The changes that a trial is."""
        pairs = zip(self.ranges, values, strict=True)
        return [*self.overrides, *(assignment(one, value) for one, value in pairs)]

    @property
    def identity(self) -> str:
        """A hash of all that decides what is tried."""
        fixed = {k: v for k, v in resolve(self.recipe).items() if k not in FREE}
        rows = [[task.train.sha256, task.eval.sha256] for task in self.sources[0]]
        text = json.dumps([fixed, [str(one) for one in self.ranges], rows], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    search: Sequence[str] = (),
    share: float | None = None,
) -> Plan:
    """Check everything before the first trial.

    Args:
        path: The recipe.
        overrides: What is changed in it, as --set takes it.
        search: What is searched, see `search.read_search`.
        share: Of the training rows that are held out; default: the recipe's, or a fifth.

    Raises:
        KeeptuneError: Anything a user can mend.
    """
    _optuna()
    share = share or load_recipe(path, overrides).validation or SHARE
    recipe = load_recipe(path, [*overrides, f"validation={share}"])
    ranges = read_search(search, path, overrides, recipe)
    with quiet():
        sources = read_sources(recipe)
    if len(recipe.tasks) < 2 and not any(not guard.transfer_of for guard in sources[1]):
        raise RecipeError(
            f"{path} has one task and no guard, so that nothing could be lost and settings cannot "
            "be weighed. Add guards, or a second task."
        )
    return Plan(path, list(overrides), recipe, ranges, sources)


def tune(
    planned: Plan, trials: int, out: Path, board: Board, engine: engines.Engine, at_once: int = 1
) -> Tuned:
    """Try settings until there are so many trials, and choose.

    Args:
        planned: The search.
        trials: How many trials there are in the end.
        out: Where the runs, the journal and what is chosen go.
        board: Shows how far it is.
        engine: Runs the trials.
        at_once: How many trials are proposed together.

    Raises:
        KeyboardInterrupt: It was stopped; the same call goes on.
        KeeptuneError: All trials failed, or another process is at work there.
    """
    refuse_unwritable(out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        study = _study(planned, out)
        finished = len(study.trials)
        board.begin(range(max(trials - finished, 0)), finished)
        while len(study.trials) < trials:
            _try(planned, study, min(at_once, trials - len(study.trials)), out, board, engine)
        board.close()
        found = chosen([_trial(frozen) for frozen in study.trials])
        return _write(planned, found, out)


def _try(
    planned: Plan,
    study: optuna.Study,
    count: int,
    out: Path,
    board: Board,
    engine: engines.Engine,
) -> None:
    """Run the next trials and put them into the journal."""
    proposals = list(_proposed(planned, study, count))
    first = len(study.trials)
    jobs = [_job(planned, values, out, first + i) for i, values in enumerate(proposals)]
    todo = {job.folder: job for job in jobs if not job.is_done}
    failed = {job.folder: said for job, said in work_off(list(todo.values()), board, engine)}
    for values, job in zip(proposals, jobs, strict=True):
        said = failed.get(job.folder, "")
        scores = None if said else objectives(load(RunFolder(job.folder)))
        if scores is not None and not np.isfinite(scores).all():
            scores, said = None, "its scores are not numbers"
        _add(study, planned.ranges, values, scores, str(job.folder), said)


def _job(planned: Plan, values: Sequence[float], out: Path, number: int) -> Job:
    held = f"validation={planned.recipe.validation}"
    recipe = load_recipe(planned.path, [*planned.changed(values), held])
    job = one_job(recipe, out, planned.sources, strategy_of(recipe), recipe.seed)
    return replace(job, title=f"trial {number}")


# -- Optuna ---------------------------------------------------------------------------------------


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise KeeptuneError("keeptune tune needs Optuna: pip install 'keeptune[tune]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study(planned: Plan, out: Path) -> optuna.Study:
    """The search in the journal; one of other settings or data has another name in it."""
    from optuna import create_study
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(out / JOURNAL)))
    return create_study(
        study_name=planned.identity,
        storage=storage,
        directions=["maximize", "maximize"],
        load_if_exists=True,
    )


def _distributions(ranges: Sequence[Range]) -> dict[str, Any]:
    kinds = _optuna().distributions
    return {
        one.key: kinds.IntDistribution(int(one.low), int(one.high), log=one.is_log)
        if one.is_whole
        else kinds.FloatDistribution(one.low, one.high, log=one.is_log)
        for one in ranges
    }


def _proposed(planned: Plan, study: optuna.Study, count: int) -> Iterator[list[float]]:
    """What to try next: it depends on the finished trials and the seed, and on nothing else.

    Source: Ozaki et al. 2022, Multiobjective tree-structured Parzen estimator.
    """
    optuna, finished = _optuna(), study.trials
    first = len(finished)
    seed = (planned.recipe.seed + first) % 2**32
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=FIRST)
    thought = optuna.create_study(directions=["maximize", "maximize"], sampler=sampler)
    thought.add_trials(finished)
    for number in range(first, first + count):
        own = own_values(planned.ranges, planned.recipe) if number == 0 else None
        if own is not None:
            yield own
            continue
        asked = thought.ask(_distributions(planned.ranges)).params
        yield [one.near(asked[one.key]) for one in planned.ranges]


def _add(
    study: optuna.Study,
    ranges: Sequence[Range],
    values: Sequence[float],
    scores: tuple[float, float] | None,
    folder: str,
    said: str,
) -> None:
    optuna = _optuna()
    state = optuna.trial.TrialState
    study.add_trial(
        optuna.trial.create_trial(
            state=state.FAIL if scores is None else state.COMPLETE,
            values=scores,
            params={one.key: value for one, value in zip(ranges, values, strict=True)},
            distributions=_distributions(ranges),
            user_attrs={"folder": folder, "said": said},
        )
    )


def _trial(frozen: optuna.trial.FrozenTrial) -> Trial:
    said = str(frozen.user_attrs["said"])
    learned, kept = frozen.values if not said else (None, None)
    folder = str(frozen.user_attrs["folder"])
    return Trial(frozen.number, dict(frozen.params), learned, kept, folder, said)


# -- what is left ---------------------------------------------------------------------------------


def _write(planned: Plan, trials: list[Trial], out: Path) -> Tuned:
    best = [trial for trial in trials if trial.is_front]
    if not best:
        raise KeeptuneError(f"All {len(trials)} trials failed; the last one: {trials[-1].said}")
    shown = [asdict(trial) for trial in trials]
    write_atomic(out / TRIALS, json.dumps(shown, indent=1).encode())
    at = next(trial for trial in trials if trial.is_knee)
    values = [at.settings[one.key] for one in planned.ranges]
    recipe = load_recipe(planned.path, planned.changed(values))
    write_atomic(
        out / KNEE, dump(recipe.model_copy(update={"out": None, "validation": None})).encode()
    )
    folders = list(dict.fromkeys(Path(t.folder) for t in (*best, trials[0]) if not t.said))
    page = report.write(folders, out / "comparison.html", varied=[o.key for o in planned.ranges])
    return Tuned(trials, out / KNEE, page)
