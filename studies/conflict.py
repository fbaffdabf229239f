"""Study: what each method answers when a later task contradicts an earlier one, on SmolLM2-135M.

    python studies/conflict.py run       # every method and seed, LoRA: about a minute a run
    python studies/conflict.py report    # tables into studies/conflict.md

Two tasks about 40 invented people: where each of them works, and where 20 of them work now. Each
run goes through `keeptune.fit` into a run folder. What it comes down to becomes one JSON line; the
weights in the folder are deleted, the rest stays. Runs whose line is there are skipped.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from peft import LoraConfig

from keeptune import guards, models, registry
from keeptune.conflicts import conflicts
from keeptune.demo import ADAPTER
from keeptune.folder import RunFolder
from keeptune.guard import Guard
from keeptune.intervals import over_seeds
from keeptune.notebook import fit
from keeptune.results import load
from keeptune.rows import read_rows
from keeptune.streams import people
from lines import Run, Runs, append, fill, paired, points, read

HERE = Path(__file__).parent
LINES, PAGE = HERE / "conflict-runs.jsonl", HERE / "conflict.md"

SEEDS = (0, 1, 2)
GUARD_ROWS = 40
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


def capitals() -> Guard:
    """Capitals of the 40 most populous countries, which the model knows."""
    ((name, rows, score),) = guards.load("capitals")
    return Guard(name, read_rows(rows.rows[:GUARD_ROWS]), score)


def adapter() -> LoraConfig:
    """The demo's: rank 16 on every matrix of the upper eight layers."""
    settings: dict[str, Any] = dict(ADAPTER)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings["rank"],
        lora_alpha=2 * settings["rank"],
        target_modules=settings["target_modules"],
        layers_to_transform=settings["layers"],
    )


def execute(label: str, seed: int, folder: Path) -> Run:
    """One run into a new folder, and what its line says.

    Args:
        label: A key of `METHODS`.
        seed: Of the people, the adapter's first weights and the order of the rows.
        folder: Deleted first: what lies there is of a run that was killed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    loaded = models.load("demo")
    fitted = fit(
        loaded.model,
        list(people.stream(seed=seed)),
        tokenizer=loaded.tokenizer,
        out=folder,
        methods=[registry.build(name, settings) for name, settings in METHODS[label].items()],
        guards=[capitals()],
        adapter=adapter(),
        trainer=TRAINER,
        seed=seed,
        eval_batch_size=64,
    )
    shutil.rmtree(folder / "state")
    return {"method": label, "seed": seed, **summary(fitted.folder)}


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


def table(runs: Runs) -> str:
    """A row for each method: the answers in the end, and against plain."""
    lines = [
        "| | kept the old | took the new | broke | other facts kept | new, against plain "
        "| other facts, against plain | capitals | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for label in METHODS:
        found = [run for run in runs if run["method"] == label]
        plain = [run for run in runs if run["method"] == "plain"] if label != "plain" else []
        if found:
            lines.append(f"| {label} | {' | '.join(_cells(found, plain))} |")
    return "\n".join(lines)


def _cells(found: Runs, plain: Runs) -> Iterator[str]:
    def share(run: Run, kind: str) -> float:
        return float(run["answers"][-1][SHARES.index(kind)])

    for kind in SHARES:
        yield points(over_seeds([share(run, kind) for run in found]))
    for kind in ("new", "untouched"):
        yield points(paired(found, plain, lambda run, kind=kind: share(run, kind)), signed=True)
    yield points(over_seeds([run["G"][-1][0] for run in found]))
    yield f"{median(run['seconds'] for run in found):.0f}"


def before(runs: Runs) -> str:
    """What was known when the later task began."""
    head = "| | knew the old | other facts | capitals before any training |"
    lines = [head, "|---|---:|---:|---:|"]
    for label in METHODS:
        if found := [run for run in runs if run["method"] == label]:
            known = [over_seeds([run["answers"][0][i] for run in found]) for i in (0, 3)]
            cells = [*map(points, known), points(over_seeds([run["G"][0][0] for run in found]))]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(runs: Runs, page: Path) -> None:
    """Put the tables between the page's markers; everything else stays as it is."""
    text = fill(page.read_text("utf-8"), "answers", table(runs))
    page.write_text(fill(text, "before", before(runs)), "utf-8")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=["run", "report"])
    parser.add_argument("--out", type=Path, default=LINES, help="one JSON line a run")
    parser.add_argument("--folders", type=Path, default=Path("runs/conflict"), help="run folders")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    args = parser.parse_args()
    if args.stage == "report":
        report(read(args.out), PAGE)
        return
    done = {(run["method"], run["seed"]) for run in read(args.out)}
    for seed in args.seeds:
        for label in args.methods:
            if (label, seed) not in done:
                line = execute(label, seed, args.folders / f"{label}-{seed}")
                append(args.out, line)
                print(label, seed, line["answers"][-1], line["G"][-1], line["seconds"], flush=True)


if __name__ == "__main__":
    main()
