"""Several runs side by side: seeds together, and every difference to plain fine-tuning paired."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import yaml

from keeptune.errors import FolderError
from keeptune.folder import RunFolder, Unit
from keeptune.intervals import Array, Estimate, over_seeds, with_interval
from keeptune.metrics import (
    DEFINITIONS,
    INTRANSIGENCE,
    Definition,
    Metric,
    Summary,
    raw,
    summarise_results,
)
from keeptune.results import Results, load
from keeptune.units import UNITS, Scale, convert, shown_as


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ in nothing but their seed.

    Attributes:
        label: The strategy, with the folder's name where two groups share a strategy.
        strategy: The methods' names.
        is_plain: Whether every method is neutral.
        results: The runs.
        summaries: One a run.
        metrics: The run's own; over two seeds or more, means with Student's t intervals.
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
        """The runs' seeds."""
        return [s.seed for s in self.summaries]

    def metric(self, key: str) -> Metric | None:
        """A metric by its key; None where there is none of that unit."""
        return next((m for m in self.metrics if m.key == key), None)


def compare(folders: Sequence[RunFolder]) -> list[Group]:
    """Group runs by recipe and measure each group against plain fine-tuning.

    With two seeds or more on both sides that are the same, differences are taken seed by seed
    (Student's t); otherwise they are paired over examples (bootstrap), on the mean of the seeds.

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
    recipe = {k: v for k, v in (recipe or {}).items() if k not in ("seed", "out")}
    info = folder.info
    data = [(d.name, d.train_sha256, d.eval_sha256) for d in (*info.tasks, *info.guards)]
    methods = [(m.name, m.settings) for m in info.methods]
    return json.dumps([recipe, data, methods], sort_keys=True, default=str)


def _has_joint(folder: RunFolder) -> bool:
    return any(method.name == "joint" for method in folder.info.methods)


def _labels(folders: list[RunFolder]) -> list[str]:
    strategies = [folder.info.strategy for folder in folders]
    return [
        s if strategies.count(s) == 1 else f"{s} ({folder.path.name})"
        for s, folder in zip(strategies, folders, strict=True)
    ]


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
            difference = _difference(results, plain, metric.key)
            if difference is not None:
                differences[metric.key] = difference
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
    """The run of another group with the same seed, or its first."""
    if not others:
        return None
    seed = run.folder.info.seed
    return next((o for o in others if o.folder.info.seed == seed), others[0])


def _over_seeds(metrics: list[Metric]) -> Metric:
    if len(metrics) == 1:
        return metrics[0]
    first = metrics[0]
    estimate = over_seeds([m.estimate.value for m in metrics])
    reason = "" if estimate.value is not None else first.reason
    return Metric(
        first.key, first.title, first.meaning, first.source, first.shown, estimate, reason
    )


def _find(key: str) -> tuple[Definition, Unit]:
    name, unit = (key.removesuffix("_perplexity"), UNITS[key.endswith("_perplexity")])
    return next(d for d in (*DEFINITIONS, INTRANSIGENCE) if d.key == name), unit


def _difference(ours: list[Results], plain: list[Results], key: str) -> Estimate | None:
    definition, unit = _find(key)
    if definition is INTRANSIGENCE:
        return None
    scale: Scale = "loss" if definition.scale == "loss" else "change"
    shown = shown_as(definition.scale, unit, difference=True)
    seeds = [r.folder.info.seed for r in ours]
    if len(ours) > 1 and sorted(seeds) == sorted(r.folder.info.seed for r in plain):
        pairs = [(r, _twin(r, plain)) for r in ours]
        gaps = [raw(r, definition, unit)[0] - raw(p, definition, unit)[0] for r, p in pairs if p]
        estimate = over_seeds([None if np.isnan(gap) else gap for gap in gaps])
        return convert(estimate, scale, shown)
    value, draws = _mean_run(ours, definition, unit)
    other, other_draws = _mean_run(plain, definition, unit)
    if np.isnan(value - other):
        return None
    return convert(with_interval(value - other, draws - other_draws, len(ours)), scale, shown)


def _mean_run(runs: list[Results], definition: Definition, unit: Unit) -> tuple[float, Array]:
    both = [raw(run, definition, unit) for run in runs]
    values = [value for value, _ in both]
    return float(np.mean(values)), np.mean([draws for _, draws in both], axis=0)
