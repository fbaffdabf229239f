"""Run folders made up in milliseconds: plausible results without any training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from keeptune.folder import RunFolder
from keeptune.records import (
    Cell,
    Cost,
    DataInfo,
    Evidence,
    Example,
    MethodInfo,
    Phase,
    RunInfo,
    TaskEvidence,
    Unit,
)

TASKS = ("French names", "Finnish names", "Welsh names")
GUARDS = ("capitals", "continents", "currencies", "languages", "instructions", "old news")
BEFORE = (0.62, 0.78, 0.55, 0.48, 0.71, 14.2)
COUNTRIES = ("Germany", "Kenya", "Peru", "Japan", "Norway", "Chad", "Fiji", "Spain", "Laos", "Oman")
EWC = MethodInfo(
    name="ewc",
    settings={"strength": 300.0, "decay": 1.0},
    is_neutral=False,
    proof="gradient_share",
    active_from=1,
)
REPLAY = MethodInfo(
    name="replay",
    settings={"ratio": 0.1, "size": 2000},
    is_neutral=False,
    proof="rows_replayed",
    active_from=1,
)
JOINT = MethodInfo(
    name="joint",
    settings={"restart": True},
    is_neutral=False,
    proof="rows_of_earlier_tasks",
    active_from=1,
)


def info(
    tasks: Sequence[str] = TASKS,
    guards: Sequence[str] = GUARDS,
    methods: Sequence[MethodInfo] = (),
    *,
    seed: int = 0,
    n: int = 120,
    **changes: Any,
) -> RunInfo:
    """A run.json; the guard "old news" and what is called "… text" is a perplexity."""
    fields: dict[str, Any] = {
        "status": "done",
        "seed": seed,
        "strategy": " + ".join(m.name for m in methods) or "plain",
        "recipe_sha256": "0" * 64,
        "model": {"source": "demo", "name": "SmolLM2-135M-Instruct", "parameters": 134_515_008},
        "tasks": [_data(name, n, trained=True) for name in tasks],
        "guards": [_data(name, n, trained=False) for name in guards],
        "methods": list(methods),
        "provenance": {
            "started": "2026-11-21T09:30:00+00:00",
            "versions": {"keeptune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "machine": {"system": "Linux 6.1", "processors": 2, "memory_bytes": 24_000_000_000},
        },
    }
    return RunInfo(**(fields | changes))


def unit(name: str) -> Unit:
    """Names that end in "text" or "news" are perplexities."""
    return "perplexity" if name.endswith(("text", "news")) else "share"


def _data(name: str, n: int, *, trained: bool) -> DataInfo:
    sha = f"{sum(map(ord, name)):064x}"
    return DataInfo(
        name=name,
        score="exact_match" if unit(name) == "share" else "perplexity",
        unit=unit(name),
        train_rows=400 if trained else 0,
        train_tokens=9_600 if trained else 0,
        train_sha256=sha[::-1] if trained else "",
        eval_rows=n,
        eval_sha256=sha,
    )


def cell(name: str, score: float, n: int = 120, row: int = 0, text: str = "") -> Cell:
    """One entry of R whose examples reach `score`; the easy examples are right first.

    Which examples are easy depends mostly on the name, a little on the row, as in real runs.
    """
    rng = np.random.default_rng([*name.encode()])
    weights = rng.integers(150, 250, n).astype(float)
    hard = rng.normal(size=n) + 0.15 * np.random.default_rng([row, *name.encode()]).normal(size=n)
    if unit(name) == "perplexity":
        nll = np.log(score) + 0.3 * hard
        nll += np.log(score) - (nll * weights).sum() / weights.sum()
        right = nll
    else:
        right = np.zeros(n)
        right[np.argsort(hard)[: round(score * n)]] = 1.0
        weights = np.ones(n)
    examples = [_example(name, i, float(right[i]), float(weights[i]), text) for i in range(n)]
    value = (
        float(np.exp(np.average(right, weights=weights)))
        if unit(name) == "perplexity"
        else (float(right.mean()))
    )
    return Cell(name=name, score=value, unit=unit(name), n=n, seconds=2.5, examples=examples)


def _example(name: str, i: int, score: float, weight: float, text: str) -> Example:
    country = COUNTRIES[i % len(COUNTRIES)]
    expected = f"{country}-{i}"
    if unit(name) == "perplexity":
        prompt, expected, answer = f"Block {i} of the text.", "", ""
    else:
        prompt = f"Question {i}, {name}: what is {country} called? {text}"
        answer = expected if score >= 0.5 else f"{country}ia {text}"
    return Example(
        id=i, prompt=prompt, expected=expected, answer=answer, score=score, weight=weight
    )


def stream(tasks: Sequence[str], gain: float, loss: float) -> list[list[float]]:
    """A plausible R, [T + 1, T]: tasks reach about 0.2 + gain, then lose `loss` a task."""
    size = len(tasks)
    return [
        [
            0.2 + 0.05 * i if row <= i else max(0.0, 0.2 + gain - 0.03 * i - loss * (row - i - 1))
            for i in range(size)
        ]
        for row in range(size + 1)
    ]


def drift(guards: Sequence[str], rows: int, loss: float) -> list[list[float]]:
    """Guards over the stream, [rows, M]: shares fall by `loss` a task, perplexities rise by it."""
    start = [BEFORE[GUARDS.index(g)] if g in GUARDS else 0.6 for g in guards]
    return [
        [
            s * (1 + loss * row * (1.2 if unit(g) == "perplexity" else -(0.6 + 0.2 * i)))
            for i, (g, s) in enumerate(zip(guards, start, strict=True))
        ]
        for row in range(rows)
    ]


def fabricate(
    path: Path,
    run: RunInfo | None = None,
    *,
    R: Sequence[Sequence[float]] | None = None,
    G: Sequence[Sequence[float]] | None = None,
    gain: float = 0.55,
    loss: float = 0.05,
    values: Mapping[str, Mapping[str, Any]] | None = None,
    text: str = "",
) -> RunFolder:
    """Write a whole run folder.

    Args:
        path: Where; must be new.
        run: Its run.json; default `info()`.
        R: Task scores [rows, T]; NaN is left out. Default `stream(…, gain, loss)`.
        G: Guard scores [rows, M]; default `drift(…, loss)`.
        gain: How much each task gains.
        loss: What tasks and guards lose with each later task.
        values: Evidence of each method by its name, in place of the usual.
        text: Put into each prompt and wrong answer.
    """
    run = run or info()
    names = [t.name for t in run.tasks], [g.name for g in run.guards]
    R = stream(names[0], gain, loss) if R is None else R
    G = drift(names[1], len(R), loss / 2) if G is None else G
    recipe = {
        "model": run.model.get("source", "demo"),
        "adapter": {"kind": "lora", "rank": 16},
        "methods": [{m.name: m.settings} for m in run.methods],
        "trainer": {"learning_rate": 2e-4, "num_train_epochs": 2},
        "seed": run.seed,
        "out": str(path),
    }
    folder = RunFolder.create(path, run, yaml.safe_dump(recipe, sort_keys=False))
    for kind, matrix, columns in (("task", R, names[0]), ("guard", G, names[1])):
        for row, scores in enumerate(matrix):
            for i, (name, score) in enumerate(zip(columns, scores, strict=True)):
                n = (run.tasks if kind == "task" else run.guards)[i].eval_rows
                if not np.isnan(score):
                    folder.write_cell(row, kind, i, cell(name, score, n, row, text))
    for index in range(len(R) - 1):
        evidence = [_evidence(m, index, values or {}) for m in run.methods]
        folder.write_evidence(TaskEvidence(task=names[0][index], index=index, methods=evidence))
    _write_cost(folder, names[0][: len(R) - 1])
    return folder


def _evidence(method: MethodInfo, index: int, values: Mapping[str, Mapping[str, Any]]) -> Evidence:
    usual: dict[str, Any] = {
        method.proof: 0 if index < method.active_from else round(0.12 + 0.07 * index, 3),
        "rows_by_task": dict.fromkeys(TASKS[:index], 20),
    }
    return Evidence(name=method.name, values=dict(values.get(method.name, usual)))


def _write_cost(folder: RunFolder, tasks: Sequence[str]) -> None:
    phases = [Phase(phase="load", seconds=3.1), Phase(phase="evaluate", seconds=9.0)]
    for index, task in enumerate(tasks):
        phases += [
            Phase(phase="train", task=task, seconds=41.0 + index, tokens=19_200),
            Phase(phase="end_task", task=task, seconds=4.2),
            Phase(phase="evaluate", task=task, seconds=9.4),
            Phase(phase="save", task=task, seconds=0.8),
        ]
        for step in range(1, 51):
            loss = 2.4 * float(np.exp(-step / 18)) + 0.4 + 0.1 * float(np.sin(step * 1.7))
            folder.log_step(task=task, step=step, loss=round(loss, 4), tokens_per_second=468.0)
    folder.write_cost(
        Cost(
            phases=phases,
            peak_memory_bytes=2_900_000_000,
            stored_bytes={
                "weights": 19_500_000,
                **{m.name: 9_800_000 for m in folder.info.methods},
            },
        )
    )
