"""Study: the rehearsal family on split digits, class-incremental, over sizes of the buffer.

    python studies/rehearsal_digits.py sweep     # settings, on validation rows
    python studies/rehearsal_digits.py final     # every size and seed, on test rows
    python studies/rehearsal_digits.py report    # tables into studies/rehearsal_digits.md

A stage appends one JSON line a run to its file and skips what the file holds already. Settings are
chosen on validation rows, with seeds of their own; the final runs are scored on test rows.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from digits_model import TASKS, accuracies, learner, tasks
from keeptune import registry
from keeptune.method import Method
from lines import Run, Runs, append, over, paired, points, read, table, write

HERE = Path(__file__).parent
SWEEP, FINAL = HERE / "rehearsal-digits-sweep.jsonl", HERE / "rehearsal-digits-final.jsonl"
PAGE = HERE / "rehearsal_digits.md"

SCENARIO = "split/class"
SIZES = (20, 50, 100, 200, 500)
SWEPT_SIZE = 100
SWEEP_SEEDS, FINAL_SEEDS = (100, 101), (10, 11, 12, 13, 14)
EPOCHS = 10
BATCH = 64
# -- what is compared -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A row of the tables.

    Attributes:
        method: Published name; "" is plain.
        settings: Those that are not swept.
        swept: Values of each setting that is; every combination is run.
        size: The setting that is the buffer's size; "" where there is none.
        share: Of the whole buffer, what `size` counts: one task's part for GEM.
        batch: Rows in a batch: twice as many where old rows stand among them, so that every method
            sees 64 new rows a step.
    """

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    swept: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    size: str = "size"
    share: int = 1
    batch: int = BATCH

    def combinations(self) -> list[dict[str, Any]]:
        """All settings that are swept."""
        return [
            dict(zip(self.swept, values, strict=True))
            for values in itertools.product(*self.swept.values())
        ]


STRENGTHS = (0.1, 0.3, 1.0, 3.0)
METHODS = {
    "plain": Entry("", size=""),
    "joint": Entry("joint", size=""),
    "A-GEM": Entry("agem", {"rows": BATCH}),
    "GEM": Entry("gem", {"rows": BATCH}, {"margin": (0.0, 0.5, 1.0)}, share=TASKS - 1),
    "features": Entry(
        # Higher strengths were added when 3 was the best of the others on validation rows.
        "feature_replay",
        {"rows": BATCH, "module": "second"},
        {"strength": (*STRENGTHS, 10.0, 30.0)},
    ),
    "ER": Entry("replay", {"ratio": 1.0, "repeats": True}, batch=2 * BATCH),
    "DER": Entry("der", {"rows": BATCH}, {"strength": STRENGTHS}),
    "DER++": Entry(
        "der_pp", {"rows": BATCH}, {"strength": STRENGTHS, "label_strength": (0.3, 1.0)}
    ),
}
# The expected order, and what is measured of it.
ORDER = ("plain", "A-GEM", "ER", "DER", "DER++")


# -- one run --------------------------------------------------------------------------------------


def job(label: str, size: int, seed: int, **swept: Any) -> Run:
    """What one run is; these are the first fields of its line."""
    entry = METHODS[label]
    sized = {entry.size: max(1, size // entry.share)} if entry.size else {}
    settings = {**entry.settings, **sized, **swept}
    return {"method": label, "size": size if entry.size else 0, "settings": settings, "seed": seed}


def strategy(job: Run) -> list[Method]:
    """The methods of a job, fresh."""
    name = METHODS[job["method"]].method
    return [registry.build(name, job["settings"])] if name else []


def execute(job: Run, part: str, learn: int = TASKS) -> Run:
    """Run one job.

    Returns:
        The job with R (row 0 is before training), the bytes that the method keeps at the end, and
        the CPU seconds of learning.
    """
    methods, stream = strategy(job), tasks(SCENARIO)[:learn]
    batches = [getattr(task, part) for task in stream]
    with tempfile.TemporaryDirectory() as folder:
        batch = METHODS[job["method"]].batch
        trainer = learner(
            SCENARIO,
            methods,
            job["seed"],
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=batch,
        )
        R = [accuracies(trainer.model, batches)]
        started = time.process_time()
        for index, task in enumerate(stream):
            trainer.learn(f"task {index}", task.train)
            R.append(accuracies(trainer.model, batches))
    assert trainer.ctx is not None
    kept = sum(method.declared_bytes(trainer.ctx) for method in methods)
    seconds = round(time.process_time() - started, 2)
    return {**job, "part": part, "R": np.round(R, 4).tolist(), "bytes": kept, "seconds": seconds}


# -- stages ---------------------------------------------------------------------------------------


def identity(run: Run) -> str:
    """What makes two runs the same."""
    return json.dumps([run[k] for k in ("method", "size", "settings", "seed")], sort_keys=True)


def accuracy(run: Run) -> float:
    """Mean over all tasks learned, after the last one."""
    return float(np.mean(run["R"][-1]))


def sweep_jobs(labels: list[str], seeds: list[int]) -> Iterator[Run]:
    """Every combination of what is swept, at one size of the buffer."""
    for label in labels:
        if METHODS[label].swept:
            for swept in METHODS[label].combinations():
                yield from (job(label, SWEPT_SIZE, seed, **swept) for seed in seeds)


def chosen(swept: Runs, label: str) -> dict[str, Any]:
    """The combination with the best mean accuracy on validation rows; of equal ones the first."""
    scores = {}
    for values in METHODS[label].combinations():
        runs = [
            run
            for run in swept
            if run["method"] == label and values.items() <= run["settings"].items()
        ]
        if not runs:
            raise SystemExit(f"The sweep of {label} lacks {values}; run the stage sweep first.")
        scores[json.dumps(values)] = np.mean([accuracy(run) for run in runs])
    best: dict[str, Any] = json.loads(max(scores, key=lambda key: scores[key]))
    return best


def final_jobs(labels: list[str], seeds: list[int], swept: Runs) -> Iterator[Run]:
    """Every method at every size, seed by seed, so that a stage that was stopped is balanced."""
    for seed in seeds:
        for label in labels:
            settings = chosen(swept, label) if METHODS[label].swept else {}
            for size in SIZES if METHODS[label].size else (0,):
                yield job(label, size, seed, **settings)


def run_stage(jobs: Runs, out: Path, part: str) -> None:
    """Run what the file does not hold yet, and append a line for each run as it ends."""
    done = {identity(run) for run in read(out)}
    left = [job for job in jobs if identity(job) not in done]
    for number, one in enumerate(left, 1):
        append(out, execute(one, part))
        print(f"{number} of {len(left)}: {one['method']} {one['size']}", flush=True)


# -- tables ---------------------------------------------------------------------------------------


def of(runs: Runs, label: str, size: int) -> Runs:
    """The runs of a method at a size; of one without a buffer, all."""
    size = size if METHODS[label].size else 0
    return [run for run in runs if (run["method"], run["size"]) == (label, size)]


def accuracy_rows(runs: Runs) -> Iterator[list[str]]:
    """A row for each method that was run, a column for each size."""
    for label in METHODS:
        if any(run["method"] == label for run in runs):
            found = [of(runs, label, size) for size in SIZES]
            yield [label, *(points(over(one, accuracy)) for one in found)]


def order_rows(runs: Runs) -> Iterator[list[str]]:
    """Each step of the expected order, seed by seed."""
    there = [label for label in ORDER if any(run["method"] == label for run in runs)]
    for low, high in itertools.pairwise(there):
        gaps = [paired(of(runs, high, s), of(runs, low, s), accuracy) for s in SIZES]
        yield [f"{high} − {low}", *(points(gap, signed=True) for gap in gaps)]


def growth_rows(runs: Runs) -> Iterator[list[str]]:
    """What each larger buffer adds to the one before."""
    for label, entry in METHODS.items():
        if entry.size and any(run["method"] == label for run in runs):
            pairs = [(of(runs, label, b), of(runs, label, a)) for a, b in itertools.pairwise(SIZES)]
            yield [label, *(points(paired(b, a, accuracy), signed=True) for b, a in pairs)]


def cost_rows(runs: Runs, swept: Runs) -> Iterator[list[str]]:
    """The settings that were chosen, the bytes at 500 rows, and the seconds."""
    for label, entry in METHODS.items():
        if found := of(runs, label, SIZES[-1]):
            best = chosen(swept, label) if entry.swept else {}
            settings = ", ".join(f"{key} {value:g}" for key, value in best.items())
            seconds = np.median([run["seconds"] for run in found])
            yield [label, settings or "–", f"{found[0]['bytes']:,}", f"{seconds:.1f}"]


def report(runs: Runs, swept: Runs) -> None:
    """Put the tables between the page's markers; everything else stays as it is."""
    sizes = " | ".join(f"{size} rows" for size in SIZES)
    steps = " | ".join(f"{a} → {b}" for a, b in itertools.pairwise(SIZES))
    costs = "|  | chosen | bytes kept at 500 rows | CPU seconds |"
    write(
        PAGE,
        {
            "accuracy": table(f"| accuracy, % | {sizes} |", accuracy_rows(runs)),
            "order": table(f"| points | {sizes} |", order_rows(runs)),
            "growth": table(f"| points | {steps} |", growth_rows(runs)),
            "cost": table(costs, cost_rows(runs, swept)),
        },
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=["sweep", "final", "report"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, help="other seeds than the stage's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    gc.collect()
    gc.freeze()  # the Trainer collects garbage after each task, and walks through all modules
    if args.stage == "sweep":
        jobs = list(sweep_jobs(args.methods, args.seeds or list(SWEEP_SEEDS)))
        run_stage(jobs, SWEEP, "val")
    elif args.stage == "final":
        jobs = list(final_jobs(args.methods, args.seeds or list(FINAL_SEEDS), read(SWEEP)))
        run_stage(jobs, FINAL, "test")
    else:
        report(read(FINAL), read(SWEEP))


if __name__ == "__main__":
    main()
