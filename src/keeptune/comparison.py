"""Several runs side by side: seeds and orders of tasks together, every difference paired."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import yaml

from keeptune.errors import FolderError
from keeptune.floors import floor
from keeptune.folder import RunFolder
from keeptune.intervals import Array, Estimate, over_seeds, with_interval
from keeptune.metrics import (
    INTRANSIGENCE,
    Definition,
    Metric,
    Summary,
    find,
    raw,
    summarise_results,
)
from keeptune.recipe import FREE
from keeptune.records import Unit
from keeptune.results import Results, load
from keeptune.units import Scale, convert, mean_over_seeds, shown_as

TRAINING = ("train", "end_task")


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ in nothing but their seed and the order of their tasks.

    Attributes:
        label: The strategy, with the settings or the folder that tell it from another of its name.
        strategy: The methods' names.
        is_plain: Whether every method is neutral.
        results: The runs.
        summaries: One a run.
        metrics: The run's own; over two runs or more, means with Student's t intervals.
        differences: By metric key, this group minus plain, in points or relative; empty without a
            plain group and in the plain group itself.
    """

    label: str
    strategy: str
    is_plain: bool
    results: list[Results]
    summaries: list[Summary]
    metrics: list[Metric]
    differences: dict[str, Estimate]

    @property
    def seeds(self) -> list[int]:
        """The runs' seeds, each once."""
        return sorted({s.seed for s in self.summaries})

    @property
    def orders(self) -> list[tuple[str, ...]]:
        """The orders of the tasks, each once."""
        return list(dict.fromkeys(order_of(r) for r in self.results))

    @property
    def is_joint(self) -> bool:
        """Whether it trains on all tasks at once: the ceiling, not a strategy for a stream."""
        return _has_joint(self.results[0].folder)

    @property
    def training_seconds(self) -> float:
        """What a run took for training and the ends of its tasks, on average."""
        phases = [p for r in self.results for p in r.folder.cost().phases]
        return sum(p.seconds for p in phases if p.phase in TRAINING) / len(self.results)

    def metric(self, key: str) -> Metric | None:
        """A metric by its key; None where there is none of that unit."""
        return next((m for m in self.metrics if m.key == key), None)


def compare(folders: Sequence[RunFolder]) -> list[Group]:
    """Group runs by recipe and measure each group against plain fine-tuning.

    Two groups are compared run by run where they share two or more pairs of seed and order
    (Student's t over those); otherwise over examples (bootstrap), on the mean of their runs, and
    with the noise between runs where it was measured.

    Raises:
        FolderError: A folder is given twice.
    """
    paths = [folder.path.resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise FolderError(f"{path} is given twice; give each run folder once.")
    runs: dict[str, list[Results]] = {}
    for folder in folders:
        runs.setdefault(recipe_key(folder), []).append(load(folder))
    groups = list(runs.values())
    joint = next((g for g in groups if _has_joint(g[0].folder)), None)
    plain = next((g for g in groups if is_plain(g[0].folder)), None)
    labels = _labels([g[0].folder for g in groups])
    return [_group(g, label, plain, joint) for g, label in zip(groups, labels, strict=True)]


def is_plain(folder: RunFolder) -> bool:
    """Whether a run is plain fine-tuning: no method, or only neutral ones."""
    return all(method.is_neutral for method in folder.info.methods)


def recipe_key(folder: RunFolder) -> str:
    """What two runs share that differ in nothing but their seed and place."""
    try:
        recipe = yaml.safe_load((folder.path / "recipe.yaml").read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise FolderError(
            f"{folder.path / 'recipe.yaml'} cannot be read: {str(error).splitlines()[0]}."
        ) from error
    recipe = {k: v for k, v in (recipe or {}).items() if k not in ("seed", *FREE)}
    if recipe.get("tasks"):
        recipe["tasks"] = sorted(recipe["tasks"], key=lambda task: json.dumps(task, default=str))
    info = folder.info
    data = [(d.name, d.train_sha256, d.eval_sha256) for d in (*info.tasks, *info.guards)]
    methods = [(m.name, m.settings) for m in info.methods]
    return json.dumps([recipe, sorted(data), methods], sort_keys=True, default=str)


def order_of(run: Results) -> tuple[str, ...]:
    """The names of a run's tasks in the order in which they are learned."""
    return tuple(task.name for task in run.folder.info.tasks)


def _has_joint(folder: RunFolder) -> bool:
    return any(method.name == "joint" for method in folder.info.methods)


def _labels(folders: list[RunFolder]) -> list[str]:
    strategies = [folder.info.strategy for folder in folders]
    labels = []
    for strategy, folder in zip(strategies, folders, strict=True):
        same = [f for f, s in zip(folders, strategies, strict=True) if s == strategy]
        words = _apart(folder, same) if len(same) > 1 else ""
        labels.append(f"{strategy} ({words})" if words else strategy)
    return [
        label if labels.count(label) == 1 else f"{strategy} ({folder.path.name})"
        for label, strategy, folder in zip(labels, strategies, folders, strict=True)
    ]


def _apart(folder: RunFolder, others: list[RunFolder]) -> str:
    """The settings in which a run differs from others of the same methods."""
    every = [[list(m.settings.items()) for m in f.info.methods] for f in (folder, *others)]
    words = []
    for number, method in enumerate(folder.info.methods):
        for key, value in method.settings.items():
            if any((key, value) not in settings[number] for settings in every):
                words.append(f"{key} {value:g}" if type(value) is float else f"{key} {value}")
    return ", ".join(words)


def _group(
    results: list[Results],
    label: str,
    plain: list[Results] | None,
    joint: list[Results] | None,
) -> Group:
    is_joint = joint is results
    summaries = [summarise_results(r, None if is_joint else _twin(r, joint)) for r in results]
    metrics = [
        _over_seeds([s.metrics[i] for s in summaries]) for i in range(len(summaries[0].metrics))
    ]
    differences = {}
    if plain is not None and plain is not results:
        for metric in metrics:
            gap = difference(results, plain, metric.key)
            if gap is not None:
                differences[metric.key] = gap
    return Group(
        label=label,
        strategy=summaries[0].strategy,
        is_plain=is_plain(results[0].folder),
        results=results,
        summaries=summaries,
        metrics=metrics,
        differences=differences,
    )


def _twin(run: Results, others: list[Results] | None) -> Results | None:
    """The run of another group with the same seed and order, or its first."""
    if not others:
        return None
    return next((other for other in others if _pairing(other) == _pairing(run)), others[0])


def _pairing(run: Results) -> tuple[int, tuple[str, ...]]:
    return run.folder.info.seed, order_of(run)


def _over_seeds(metrics: list[Metric]) -> Metric:
    if len(metrics) == 1:
        return metrics[0]
    first = metrics[0]
    estimate = mean_over_seeds([m.estimate.value for m in metrics], first.shown)
    reason = "" if estimate.value is not None else first.reason
    return Metric(
        first.key, first.title, first.meaning, first.source, first.shown, estimate, reason
    )


def difference(ours: list[Results], theirs: list[Results], key: str) -> Estimate | None:
    """One group minus another in a metric, paired: run by run, or example by example.

    Args:
        ours: The runs of the one group.
        theirs: The runs of the other.
        key: The metric's key.

    Returns:
        In points or relative; None where one of them has no value.
    """
    definition, unit = find(key)
    if definition is INTRANSIGENCE:
        return None
    scale: Scale = "loss" if definition.scale == "loss" else "change"
    shown = shown_as(definition.scale, unit, difference=True)
    twins = {_pairing(run): run for run in theirs}
    pairs = [(run, twins[_pairing(run)]) for run in ours if _pairing(run) in twins]
    if len(pairs) > 1:
        gaps = [raw(r, definition, unit)[0] - raw(t, definition, unit)[0] for r, t in pairs]
        estimate = over_seeds([None if np.isnan(gap) else gap for gap in gaps])
        return convert(estimate, scale, shown) if estimate.value is not None else None
    value, draws = _mean_run(ours, definition, unit)
    other, other_draws = _mean_run(theirs, definition, unit)
    if np.isnan(value - other):
        return None
    found = with_interval(value - other, draws - other_draws, len(ours))
    spreads = [spread for run in (*ours, *theirs) if (spread := run.spread("metric", key))]
    most = max((floor(spread, len(ours), len(theirs)) for spread in spreads), default=0.0)
    return convert(replace(found, floor=most), scale, shown)


def _mean_run(runs: list[Results], definition: Definition, unit: Unit) -> tuple[float, Array]:
    both = [raw(run, definition, unit) for run in runs]
    values = [value for value, _ in both]
    if np.isnan(values).any():
        return float("nan"), np.full(1, np.nan)
    return float(np.mean(values)), np.mean([draws for _, draws in both], axis=0)
