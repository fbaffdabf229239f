"""Settings searched for: trials on held-out training rows, and those that none beats.

a recipe, ranges ─► what to try next, by Optuna ─► run ─► learned, kept ─► ... ─► front, knee

Only finished trials are in the journal. What comes next follows from them alone, so that after a
kill the same trial is proposed again, and its run goes on in the folder that its content names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keeptune import engines, report
from keeptune.board import Board
from keeptune.compare import FREE, one_job, work_off
from keeptune.disk import locked, write_atomic
from keeptune.errors import KeeptuneError, RecipeError
from keeptune.folder import RunFolder
from keeptune.jobs import Job
from keeptune.ranking import front
from keeptune.recipe import Recipe, dump, load_recipe, resolve
from keeptune.results import Results, load
from keeptune.runs import quiet
from keeptune.search import Range, assignment, own_values, read_search
from keeptune.session import read_sources
from keeptune.strategies import strategy_of

if TYPE_CHECKING:
    import optuna

FIRST = 5  # trials drawn before what they showed decides
JOURNAL, TRIALS, KNEE = "trials.log", "trials.json", "knee.yaml"


@dataclass(frozen=True)
class Trial:
    """One run of the search; all scores on held-out rows.

    Attributes:
        number: From 0; the first has the recipe's own settings, where they lie in the ranges.
        settings: What was tried, by its key.
        learned: What training added to each task, on average, higher is better.
        kept: How guards and earlier tasks changed since, on average, higher is better.
        folder: The run's folder.
        said: Why it failed; "" where it did not.
        is_front: Whether no other trial learned more and kept as much, or the other way round.
        is_knee: Whether it is the one to be chosen.
    """

    number: int
    settings: dict[str, float]
    learned: float | None
    kept: float | None
    folder: str
    said: str
    is_front: bool = False
    is_knee: bool = False


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
    sources: Any

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
    path: Path, overrides: Sequence[str] = (), *, search: Sequence[str] = (), share: float = 0.2
) -> Plan:
    """Check everything before the first trial.

    Args:
        path: The recipe.
        overrides: What is changed in it, as --set takes it.
        search: What is searched, see `search.read_search`.
        share: Of the training rows that are held out.

    Raises:
        KeeptuneError: Anything a user can mend.
    """
    _optuna()
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
    jobs = [_job(planned, values, out) for values in proposals]
    todo = {job.folder: job for job in jobs if not job.is_done}
    failed = {job.folder: said for job, said in work_off(list(todo.values()), board, engine)}
    for values, job in zip(proposals, jobs, strict=True):
        said, scores = failed.get(job.folder, ""), None
        if not said:
            scores = objectives(load(RunFolder(job.folder)))
            said = "" if np.isfinite(scores).all() else "its scores are not numbers"
        _add(study, planned.ranges, values, None if said else scores, str(job.folder), said)


def _job(planned: Plan, values: Sequence[float], out: Path) -> Job:
    held = f"validation={planned.recipe.validation}"
    recipe = load_recipe(planned.path, [*planned.changed(values), held])
    return one_job(recipe, out, planned.sources, strategy_of(recipe), recipe.seed)


# -- what was learned and kept --------------------------------------------------------------------


def objectives(results: Results) -> tuple[float, float]:
    """What a run learned and kept, higher is better.

    Returns:
        The mean of what training added to each task; and the mean of how each guard changed since
        the start, and each earlier task since it was learned. Shares count as they are,
        perplexities by minus their logarithm.
    """
    tasks = [column.goodness for column in results.tasks]
    learned = [scores[i + 1] - scores[0] for i, scores in enumerate(tasks)]
    kept = [scores[-1] - scores[i + 1] for i, scores in enumerate(tasks[:-1])]
    kept += [column.goodness[-1] - column.goodness[0] for column in results.kept]
    return float(np.mean(learned)), float(np.mean(kept))


def chosen(trials: Sequence[Trial]) -> list[Trial]:
    """The trials, with those on the front and the one at its knee marked."""
    known = [(t.number, t.learned, t.kept) for t in trials if not t.said]
    points = [(learned or 0.0, kept or 0.0) for _, learned, kept in known]
    best = front(points)
    if not best:
        return list(trials)
    at = known[best[knee([points[i] for i in best])]][0]
    numbers = {known[i][0] for i in best}
    return [
        Trial(**asdict(t) | {"is_front": t.number in numbers, "is_knee": t.number == at})
        for t in trials
    ]


def knee(points: Sequence[tuple[float, float]]) -> int:
    """Position of the point of a front that is furthest beyond the line between its two ends.

    Both directions are counted as shares of the front's width. Where no point is beyond the line,
    it is the end that keeps most.

    Source: Branke et al. 2004, Finding knees in multi-objective optimization; the chord is that of
        Das 1999, On characterizing the "knee" of the Pareto curve.
    """
    x, y = np.array(points, dtype=np.float64).T
    width, height = (float(np.ptp(side)) or 1.0 for side in (x, y))
    beyond = (x - x.min()) / width + (y - y.min()) / height
    # Rounding must not decide between the ends.
    furthest = np.flatnonzero(beyond > beyond.max() - 1e-9)
    return int(furthest[np.argmax(y[furthest])])


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
    return Tuned(trials, out / KNEE, report.write(folders, out / "comparison.html"))
