"""Study: the regularisation family on split and permuted digits, three scenarios each.

    python studies/digits.py share     # shares of `strength: auto`, five tasks, validation rows
    python studies/digits.py sweep     # every strength, first two tasks, validation rows
    python studies/digits.py final     # all five tasks, test rows, other seeds
    python studies/digits.py report    # tables and curves into studies/digits.md

A stage appends one JSON line a run to its file and skips what the file holds already, so that a
killed stage goes on when it is called again.

The discipline: a strength is chosen on validation rows of the first two tasks, with seeds of its
own. The final runs are scored on test rows, by which no strength was chosen.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from digits_model import TASKS, accuracies, learner, scenarios, tasks
from keeptune import registry
from keeptune.errors import TrainingError
from keeptune.method import Method
from lines import append, read

HERE = Path(__file__).parent
SHARE, SWEEP, FINAL = (HERE / f"digits-{stage}.jsonl" for stage in ("share", "sweep", "final"))

# -- what is compared -----------------------------------------------------------------------------

SHARE_SEEDS = (200, 201)
SWEEP_SEEDS = (100, 101)
FINAL_SEEDS = (10, 11, 12)
SHARES = (0.1, 0.3, 1.0)
FAMILY = ["l2sp", "ewc", "si", "mas", "hierarchical"]


@dataclass(frozen=True)
class Entry:
    """A row of the tables.

    Attributes:
        method: Published name; "" is plain.
        settings: Beside the strength and the precision.
        exponents: First and last power of ten of the swept strengths; None has no strength.
        precisions: Forms of the stored state that are run beside the default at the chosen
            strength.
    """

    method: str
    settings: dict[str, Any]
    exponents: tuple[int, int] | None = None
    precisions: tuple[str, ...] = ()

    @property
    def strengths(self) -> list[float]:
        """The swept strengths, one a decade."""
        first, last = self.exponents or (0, -1)
        return [10.0**power for power in range(first, last + 1)]


SMALLER = ("bfloat16", "uint8")
METHODS: dict[str, Entry] = {
    "plain": Entry("", {}),
    "joint": Entry("joint", {}),
    "replay": Entry("replay", {"ratio": 1.0, "size": 100}),
    "l2sp": Entry("l2sp", {}, (-4, 3)),
    "ewc": Entry("ewc", {}, (0, 12), SMALLER),
    "ewc online": Entry("ewc", {"form": "online"}, (-5, 7)),
    "ewc sampled": Entry("ewc", {"fisher": "sampled"}, (0, 12)),
    "ewc exact": Entry("ewc", {"fisher": "exact"}, (0, 12)),
    "ewc signs": Entry("ewc", {"fisher": "signs"}, (0, 12)),
    "ewc batched": Entry("ewc", {"fisher": "batched"}, (1, 14)),
    "si": Entry("si", {}, (-3, 6), SMALLER),
    "mas": Entry("mas", {}, (-4, 5)),
    "hierarchical": Entry("hierarchical", {}, (-3, 6)),
}
# What is kept of a method's evidence.
SHOWN = ("strength", "gradient_share")

# -- one run --------------------------------------------------------------------------------------


def job(name: str, label: str, seed: int, strength: Any = None, **settings: Any) -> dict[str, Any]:
    """What one run is; these are the first fields of its line.

    Args:
        name: The scenario.
        label: A key of `METHODS`.
        seed: Of the weights and the order of the rows.
        strength: A number, "auto", or None for a method without.
        **settings: In addition to the entry's.
    """
    given = {} if strength is None else {"strength": strength}
    settings = {**METHODS[label].settings, **settings, **given}
    return {"scenario": name, "method": label, "settings": settings, "seed": seed}


def strategy(job: dict[str, Any]) -> list[Method]:
    """The methods of a job, fresh."""
    method = METHODS[job["method"]].method
    return [registry.build(method, job["settings"])] if method else []


def execute(job: dict[str, Any], *, learn: int, part: str) -> dict[str, Any]:
    """Run one job.

    Args:
        job: See there.
        learn: Learn so many tasks of the stream.
        part: "val" or "test".

    Returns:
        The job with R (row 0 is before training; None where training failed), the methods'
        evidence a task, and the CPU seconds of learning.
    """
    name, methods = job["scenario"], strategy(job)
    stream = tasks(name)[:learn]
    batches = [getattr(task, part) for task in stream]
    evidence, seconds, error = [], 0.0, ""
    with tempfile.TemporaryDirectory() as folder:
        trainer = learner(name, methods, job["seed"], folder)
        R = [accuracies(trainer.model, batches)]
        for index, task in enumerate(stream):
            started = time.process_time()
            try:
                trainer.learn(f"task {index}", task.train)
            except TrainingError as problem:
                error = str(problem)
                break
            seconds += time.process_time() - started
            shown = [m.evidence() for m in methods]
            evidence.append({k: e[k] for e in shown for k in SHOWN if k in e})
            R.append(accuracies(trainer.model, batches))
    line = {**job, "part": part, "R": None if error else R, "evidence": evidence}
    return {**line, "seconds": round(seconds, 3)} | ({"error": error} if error else {})


# -- stages ---------------------------------------------------------------------------------------


def identity(run: dict[str, Any]) -> str:
    """What makes two runs the same."""
    return json.dumps([run[k] for k in ("scenario", "method", "settings", "seed")], sort_keys=True)


def share_jobs(labels: list[str], names: list[str], seeds: list[int]) -> Iterator[dict[str, Any]]:
    """The family at every share, where one head serves all tasks, and plain training."""
    for name in names:
        for seed in seeds if name.endswith("/domain") else []:
            yield job(name, "plain", seed)
            for label in labels:
                for share in SHARES if label in FAMILY else []:
                    yield job(name, label, seed, "auto", share=share)


def sweep_jobs(labels: list[str], names: list[str], seeds: list[int]) -> Iterator[dict[str, Any]]:
    """Every strength of every method, and what has none."""
    for name in names:
        for label in labels:
            strengths: list[Any] = METHODS[label].strengths
            for strength in [*strengths, "auto"] if strengths else [None]:
                for seed in seeds:
                    yield job(name, label, seed, strength)


def chosen(runs: list[dict[str, Any]], name: str, label: str) -> float:
    """The strength with the best mean accuracy over the first two tasks, validation rows.

    Where several are equally good, the middle one (the lower of two).
    """
    scores: dict[float, list[float]] = {}
    for run in runs:
        strength = run["settings"].get("strength")
        if (run["scenario"], run["method"]) == (name, label) and isinstance(strength, float):
            scores.setdefault(strength, []).append(np.mean(run["R"][-1]) if run["R"] else 0.0)
    if not scores:
        raise SystemExit(f"There is no sweep of {label} in {name}; run the stage sweep first.")
    means = {strength: round(float(np.mean(s)), 9) for strength, s in scores.items()}
    best = sorted(s for s, mean in means.items() if mean == max(means.values()))
    return best[(len(best) - 1) // 2]


def final_jobs(
    labels: list[str], names: list[str], seeds: list[int], swept: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Every method at its chosen strength and at "auto", and with its state kept smaller."""
    for name in names:
        for label in labels:
            entry = METHODS[label]
            strength = chosen(swept, name, label) if entry.exponents else None
            for seed in seeds:
                yield job(name, label, seed, strength)
                if entry.exponents:
                    yield job(name, label, seed, "auto")
                for precision in entry.precisions:
                    yield job(name, label, seed, strength, precision=precision)


def prepare() -> None:
    """Make a worker quick and quiet."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    # The Trainer collects garbage after each task, and walks through all imported modules then.
    gc.collect()
    gc.freeze()


def run_stage(jobs: list[dict[str, Any]], out: Path, workers: int, **how: Any) -> None:
    """Run what the file does not hold yet, and append a line for each run as it ends."""
    done = {identity(run) for run in read(out)}
    left = [job for job in jobs if identity(job) not in done]
    for job in left:
        strategy(job)  # a setting that is wrong shows now, and not in the middle
    print(f"{len(jobs)} runs, {len(jobs) - len(left)} of them in {out} already")
    started = time.monotonic()
    pool = multiprocessing.get_context("spawn").Pool(workers, prepare)
    with pool:
        for number, run in enumerate(pool.imap_unordered(partial(execute, **how), left), 1):
            append(out, run)
            if number % 20 == 0 or number == len(left):
                print(f"{number} of {len(left)}, {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=["share", "sweep", "final", "report"])
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--out", type=Path, help="the stage's file")
    parser.add_argument("--share", type=Path, default=SHARE, help="what report reads")
    parser.add_argument("--sweep", type=Path, default=SWEEP, help="what final and report read")
    parser.add_argument("--final", type=Path, default=FINAL, help="what report reads")
    parser.add_argument("--learn", type=int, default=2, help="tasks of a sweep; 5 only to look at")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--scenarios", nargs="+", choices=scenarios(), default=scenarios())
    parser.add_argument("--seeds", nargs="+", type=int, help="other seeds than the stage's")
    args = parser.parse_args()
    if args.stage == "share":
        jobs = list(share_jobs(args.methods, args.scenarios, args.seeds or list(SHARE_SEEDS)))
        run_stage(jobs, args.out or SHARE, args.jobs, learn=TASKS, part="val")
    elif args.stage == "sweep":
        jobs = list(sweep_jobs(args.methods, args.scenarios, args.seeds or list(SWEEP_SEEDS)))
        run_stage(jobs, args.out or SWEEP, args.jobs, learn=args.learn, part="val")
    elif args.stage == "final":
        seeds, swept = args.seeds or list(FINAL_SEEDS), read(args.sweep)
        jobs = list(final_jobs(args.methods, args.scenarios, seeds, swept))
        run_stage(jobs, args.out or FINAL, args.jobs, learn=TASKS, part="test")
    else:
        from digits_report import write

        runs = (read(args.share), read(args.sweep), read(args.final))
        write(*runs, args.out or HERE / "digits.md")


if __name__ == "__main__":
    main()
