"""Study: the regularisation family on SmolLM2-135M, with LoRA and with all weights.

    python studies/smollm.py run       # every method, weights and seed: about a minute a run
    python studies/smollm.py report    # tables into studies/smollm.md

Three tasks of real facts that the model does not know: the names of 32 countries in Turkish,
Icelandic and Latvian. Two guards of facts that it knows: capitals and continents. Each run goes
through `keeptune.fit` into a run folder. Its summary becomes one JSON line; the weights in the
folder are deleted, the rest stays. Runs whose line is there are skipped.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that spin while they wait cost the other process of a shared machine most of its speed.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from peft import LoraConfig

from keeptune import formulas, guards, models, registry
from keeptune.demo import ADAPTER
from keeptune.folder import RunFolder
from keeptune.guard import Guard
from keeptune.notebook import fit
from keeptune.rows import read_rows
from keeptune.stream import Task
from keeptune.streams import names
from lines import Run, Runs, by_method, on, over, paired, points
from stages import study

PAGE = Path(__file__).with_suffix(".md")

COUNTRIES = 32
GUARD_ROWS = 40
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
# In float32 on a GPU too, so that a study says the same wherever it is run.
COMMON = {
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "linear",
    "bf16": False,
    "activation_checkpointing": False,
}


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


def fitted(
    stream: Sequence[Task],
    methods: dict[str, dict[str, Any]],
    seed: int,
    folder: Path,
    *,
    known: list[Guard],
    trainer: dict[str, Any],
    lora: LoraConfig | None,
    budget: dict[str, float] | None = None,
) -> RunFolder:
    """Train SmolLM2-135M on a stream, and delete the weights; everything else stays.

    Args:
        stream: The tasks.
        methods: Name to settings.
        seed: Of the adapter's first weights, the order of the rows, and what is written.
        folder: Deleted first: what lies there is of a run that was killed.
        known: What it knows before.
        trainer: Settings of the trainer.
        lora: None for all weights.
        budget: What may be lost, as in a recipe.
    """
    shutil.rmtree(folder, ignore_errors=True)
    loaded = models.load("demo")
    done = fit(
        loaded.model,
        stream,
        tokenizer=loaded.tokenizer,
        out=folder,
        methods=[registry.build(name, settings) for name, settings in methods.items()],
        guards=known,
        adapter=lora,
        trainer=trainer,
        seed=seed,
        eval_batch_size=64,
        budget=budget,
    )
    shutil.rmtree(folder / "state")
    return done.folder


def execute(weights: str, method: str, seed: int, folder: Path) -> Run:
    """One run into a new folder, and what its line says: with "lora" or "full" weights."""
    return summary(
        fitted(
            tasks(),
            METHODS[method],
            seed,
            folder,
            known=kept(),
            trainer={**COMMON, **TRAINERS[weights]},
            lora=adapter() if weights == "lora" else None,
        )
    )


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


HEAD = (
    "| | learned | average | against plain | forgotten | guards kept | against plain "
    "| strength | seconds |"
)


def tables(runs: Runs) -> dict[str, str]:
    """For adapters and for all weights, what each method learned, forgot and kept."""
    return {
        weights: by_method(HEAD, [r for r in runs if r["weights"] == weights], METHODS, _cells)
        for weights in TRAINERS
    }


def shares(found: Runs, plain: Runs) -> Iterator[str]:
    """What was learned, forgotten and kept, against plain too."""
    average, share = on("R", formulas.average_accuracy), on("G", formulas.share_kept)
    yield points(over(found, on("R", formulas.learning_accuracy)))
    yield points(over(found, average))
    yield points(paired(found, plain, average), signed=True)
    yield points(over(found, on("R", formulas.forgetting)))
    yield points(over(found, share))
    yield points(paired(found, plain, share), signed=True)


def seconds(found: Runs) -> str:
    """What a run took, all phases together."""
    return f"{median(sum(run['seconds'].values()) for run in found):.0f}"


def _cells(found: Runs, plain: Runs) -> Iterator[str]:
    yield from shares(found, plain)
    given = [
        values["strength"]
        for run in found
        for values in run["evidence"][-1].values()
        if isinstance(values.get("strength"), float)
    ]
    yield f"{median(given):.3g}" if given else ""
    yield seconds(found)


if __name__ == "__main__":
    study(__doc__, PAGE, METHODS, tables, execute, axis=("weights", "--weights", list(TRAINERS)))
