"""Study: what each method answers when a later task contradicts an earlier one, on SmolLM2-135M.

    python studies/conflict.py run       # every method and seed, LoRA: about a minute a run
    python studies/conflict.py report    # tables into studies/conflict.md

Two tasks about 40 invented people: where each of them works, and where 20 of them work now. Each
run goes through `keeptune.fit` into a run folder. What it comes down to becomes one JSON line; the
weights in the folder are deleted, the rest stays. Runs whose line is there are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from keeptune.conflicts import conflicts
from keeptune.folder import RunFolder
from keeptune.results import load
from keeptune.streams import people
from lines import Run, Runs, by_method, over, paired, points
from smollm import adapter, fitted, kept
from stages import study

PAGE = Path(__file__).with_suffix(".md")

METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "replay": {"replay": {"ratio": 0.5}},
    "lwf": {"lwf": {}},
    "ewc": {"ewc": {"strength": "auto"}},
    "eaft": {"eaft": {}},
    "wise": {"wise": {}},
}
TRAINER: dict[str, Any] = {
    "learning_rate": 2e-3,
    "num_train_epochs": 10,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "linear",
}
SHARES = ("old", "new", "neither", "untouched")


def execute(method: str, seed: int, folder: Path) -> Run:
    """One run into a new folder, and what its line says; the seed is of the people too."""
    capitals, _ = kept()
    return summary(
        fitted(
            list(people.stream(seed=seed)),
            METHODS[method],
            seed,
            folder,
            known=[capitals],
            trainer=TRAINER,
            lora=adapter(),
        )
    )


def summary(folder: RunFolder) -> Run:
    """What a run folder comes down to: the answers after each task, R, guards and seconds."""
    (conflict,) = conflicts(load(folder))
    pairs = zip(conflict.answers, conflict.untouched, strict=True)
    return {
        "facts": conflict.n,
        "answers": [
            [e.value for e in (a.old, a.new, a.neither, untouched)] for a, untouched in pairs
        ],
        "R": folder.matrix("task").round(4).tolist(),
        "G": folder.matrix("guard").round(4).tolist(),
        "methods": [method.model_dump(mode="json") for method in folder.info.methods],
        "seconds": round(sum(phase.seconds for phase in folder.cost().phases), 1),
        "provenance": folder.info.provenance,
    }


# -- tables ---------------------------------------------------------------------------------------


END = (
    "| | kept the old | took the new | broke | other facts kept | new, against plain "
    "| other facts, against plain | capitals | seconds |"
)
BEFORE = "| | knew the old | other facts | capitals before any training |"


def tables(runs: Runs) -> dict[str, str]:
    """The answers in the end, and what was known when the later task began."""
    return {
        "answers": by_method(END, runs, METHODS, _end),
        "before": by_method(BEFORE, runs, METHODS, _before),
    }


def _share(kind: str, task: int) -> Callable[[Run], float]:
    return lambda run: float(run["answers"][task][SHARES.index(kind)])


def _capitals(row: int) -> Callable[[Run], float]:
    return lambda run: float(run["G"][row][0])


def _end(found: Runs, plain: Runs) -> Iterator[str]:
    for kind in SHARES:
        yield points(over(found, _share(kind, -1)))
    for kind in ("new", "untouched"):
        yield points(paired(found, plain, _share(kind, -1)), signed=True)
    yield points(over(found, _capitals(-1)))
    yield f"{median(run['seconds'] for run in found):.0f}"


def _before(found: Runs, plain: Runs) -> Iterator[str]:
    for value in (_share("old", 0), _share("untouched", 0), _capitals(0)):
        yield points(over(found, value))


if __name__ == "__main__":
    study(__doc__, PAGE, METHODS, tables, execute, shown=("answers", "G", "seconds"))
