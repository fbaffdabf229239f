"""Study: the regularisation family on SmolLM2-135M, with LoRA and with all weights.

    python studies/smollm.py run       # every method, weights and seed: about a minute a run
    python studies/smollm.py report    # tables into studies/smollm.md

Three tasks of real facts that the model does not know: the names of 32 countries in Turkish,
Icelandic and Latvian. Two guards of facts that it knows: capitals and continents. Each run goes
through `keeptune.fit` into a run folder. Its summary becomes one JSON line; the weights in the
folder are deleted, the rest stays. Runs whose line is there are skipped.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that spin while they wait cost the other process of a shared machine most of its speed.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from peft import LoraConfig

from keeptune import formulas, guards, models, registry
from keeptune.demo import ADAPTER
from keeptune.folder import RunFolder
from keeptune.guard import Guard
from keeptune.intervals import Estimate, over_seeds
from keeptune.notebook import fit
from keeptune.rows import read_rows
from keeptune.stream import Task
from keeptune.streams import names
from lines import Run, Runs, append, fill, paired, points, read

HERE = Path(__file__).parent
LINES, PAGE = HERE / "smollm-runs.jsonl", HERE / "smollm.md"

COUNTRIES = 32
GUARD_ROWS = 40
SEEDS = (0, 1, 2)
AUTO = {"strength": "auto"}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "joint": {"joint": {}},
    "replay": {"replay": {"ratio": 0.3}},
    "l2sp": {"l2sp": AUTO},
    "ewc": {"ewc": AUTO},
    "si": {"si": AUTO},
    "mas": {"mas": AUTO},
    "hierarchical": {"hierarchical": AUTO},
}
# Passes and steps are chosen so that plain training learns most names within a minute of CPU time.
TRAINERS: dict[str, dict[str, Any]] = {
    "lora": {"learning_rate": 2e-3, "num_train_epochs": 6},
    "full": {"learning_rate": 2e-4, "num_train_epochs": 4},
}
COMMON = {"per_device_train_batch_size": 8, "lr_scheduler_type": "linear"}


# -- one run --------------------------------------------------------------------------------------


def tasks() -> list[Task]:
    """Three languages; 32 names each in one wording, asked again as they were learned."""
    return [
        Task(language.lower(), rows, rows, "greedy_match", recall=True)
        for code, language in names.LANGUAGES.items()
        for rows in [read_rows(names.rows(code, names.TRAINED[0])[:COUNTRIES])]
    ]


def kept() -> list[Guard]:
    """Capitals and continents of the 40 most populous countries."""
    return [
        Guard(name, read_rows(rows.rows[:GUARD_ROWS]), score)
        for guard in ("capitals", "continents")
        for name, rows, score in guards.load(guard)
    ]


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


def execute(weights: str, label: str, seed: int, folder: Path) -> Run:
    """One run into a new folder, and what its line says.

    Args:
        weights: "lora" or "full".
        label: A key of `METHODS`.
        seed: Of the adapter's first weights and the order of the rows.
        folder: Deleted first: what lies there is of a run that was killed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    loaded = models.load("demo")
    fitted = fit(
        loaded.model,
        tasks(),
        tokenizer=loaded.tokenizer,
        out=folder,
        methods=[registry.build(name, settings) for name, settings in METHODS[label].items()],
        guards=kept(),
        adapter=adapter() if weights == "lora" else None,
        trainer={**COMMON, **TRAINERS[weights]},
        seed=seed,
        eval_batch_size=64,
    )
    shutil.rmtree(folder / "state")
    return {"weights": weights, "method": label, "seed": seed, **summary(fitted.folder)}


def summary(folder: RunFolder) -> Run:
    """What a run folder comes down to: R, guards, evidence, seconds and bytes."""
    cost, seconds = folder.cost(), Counter[str]()
    for phase in cost.phases:
        seconds[phase.phase] += phase.seconds  # type: ignore[assignment]
    return {
        "tasks": [task.name for task in folder.info.tasks],
        "R": folder.matrix("task").round(4).tolist(),
        "guards": [guard.name for guard in folder.info.guards],
        "G": folder.matrix("guard").round(4).tolist(),
        "methods": [method.model_dump(mode="json") for method in folder.info.methods],
        "evidence": [
            {m.name: scalars(m.values) for m in evidence.methods} for evidence in folder.evidence()
        ],
        "seconds": {phase: round(value, 1) for phase, value in seconds.items()},
        "stored_bytes": cost.stored_bytes,
        "peak_memory_bytes": cost.peak_memory_bytes,
        "provenance": folder.info.provenance,
    }


def scalars(values: dict[str, Any]) -> dict[str, Any]:
    """What of a method's evidence is one number or word."""
    return {k: v for k, v in values.items() if isinstance(v, int | float | str)}


# -- tables ---------------------------------------------------------------------------------------


def table(runs: Runs, weights: str) -> str:
    """A row for each method: what was learned, forgotten and kept, against plain too."""

    def selected(label: str) -> Runs:
        return [run for run in runs if (run["weights"], run["method"]) == (weights, label)]

    lines = [
        "| | learned | average | against plain | forgotten | guards kept | against plain "
        "| strength | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for label in METHODS:
        if found := selected(label):
            cells = _cells(found, selected("plain") if label != "plain" else [])
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(found: Runs, plain: Runs) -> Iterator[str]:
    def over(value: Any, key: str = "R") -> Estimate:
        return over_seeds([float(value(np.array(run[key]))) for run in found])

    def average(run: Run) -> float:
        return float(formulas.average_accuracy(np.array(run["R"])))

    def share(run: Run) -> float:
        return float(formulas.share_kept(np.array(run["G"])))

    yield points(over(formulas.learning_accuracy))
    yield points(over(formulas.average_accuracy))
    yield points(paired(found, plain, average), signed=True)
    yield points(over(formulas.forgetting))
    yield points(over(formulas.share_kept, "G"))
    yield points(paired(found, plain, share), signed=True)
    given = [
        values["strength"]
        for run in found
        for values in run["evidence"][-1].values()
        if isinstance(values.get("strength"), float)
    ]
    yield f"{median(given):.3g}" if given else ""
    yield f"{median(sum(run['seconds'].values()) for run in found):.0f}"


def report(runs: Runs, page: Path) -> None:
    """Put the tables between the page's markers; everything else stays as it is."""
    text = page.read_text("utf-8")
    for weights in TRAINERS:
        text = fill(text, weights, table(runs, weights))
    page.write_text(text, "utf-8")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=["run", "report"])
    parser.add_argument("--out", type=Path, default=LINES, help="one JSON line a run")
    parser.add_argument("--folders", type=Path, default=Path("runs/smollm"), help="run folders")
    parser.add_argument("--weights", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    args = parser.parse_args()
    if args.stage == "report":
        report(read(args.out), PAGE)
        return
    done = {(run["weights"], run["method"], run["seed"]) for run in read(args.out)}
    for seed in args.seeds:
        for weights in args.weights:
            for label in args.methods:
                if (weights, label, seed) in done:
                    continue
                line = execute(weights, label, seed, args.folders / f"{weights}-{label}-{seed}")
                append(args.out, line)
                print(weights, label, seed, line["R"][-1], line["G"][-1], line["seconds"])


if __name__ == "__main__":
    main()
