"""The demo: a real model learns names of countries in three languages, plainly and protected.

Guards ask for what it knew before (capitals, continents, currencies), and for the learned names
in a wording that was never trained. Both runs see the same rows, steps and learning rate.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keeptune import report
from keeptune.disk import refuse_unwritable
from keeptune.folder import RunFolder
from keeptune.progress import Progress
from keeptune.recipe import Recipe, parse_recipe
from keeptune.rows import Rows
from keeptune.runs import run
from keeptune.streams import names

# Adapters on the upper layers alone: the gradient need not go further down, which saves half the
# time on a CPU.
ADAPTER = {
    "kind": "lora",
    "rank": 16,
    "layers": list(range(22, 30)),
    "target_modules": [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ],
}  # fmt: skip
TRAINER = {
    "learning_rate": 2e-3,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "linear",
}
STRATEGIES: dict[str, list[dict[str, Any]]] = {
    "plain": [],
    "protected": [{"replay": {"ratio": 0.3}}, {"lwf": {"strength": 0.5}}],
}


def run_demo(out: Path, progress: Progress) -> Path:
    """Run the demo, or go on with one that was stopped.

    Args:
        out: Folder for the data, both run folders and the report.
        progress: Who is told.

    Returns:
        The report's page.

    Raises:
        KeeptuneError: A package of the demo is missing, or anything else a user can mend.
    """
    refuse_unwritable(out)
    folders: list[RunFolder] = []
    for name in STRATEGIES:
        progress.note(f"{name} run of the demo")
        recipe = demo_recipe(out, name)
        first = folders[0] if folders else None
        folders.append(run(recipe, resume=True, progress=progress, row_0=first))
    return report.write([folder.path for folder in folders], out / "report.html")


def demo_recipe(out: Path, strategy: str) -> Recipe:
    """The recipe of one of the two runs; writes the data it names, if it is not there yet.

    Args:
        out: The demo's folder.
        strategy: A key of `STRATEGIES`.
    """
    data = out / "data"
    tasks = [
        {
            "name": task.name,
            "train": _write(data / f"{task.name}.train.jsonl", task.train),
            "eval": _write(data / f"{task.name}.eval.jsonl", task.eval),
            "score": task.score,
            "recall": True,
        }
        for task in names.stream()
    ]
    guards: list[Any] = ["facts"]
    for guard in names.new_wordings():
        assert guard.rows is not None
        file = data / f"{guard.name.replace(', ', '-').replace(' ', '-')}.jsonl"
        guards.append(
            {
                "name": guard.name,
                "eval": _write(file, guard.rows),
                "score": guard.score,
                "transfer_of": guard.transfer_of,
            }
        )
    return parse_recipe(
        {
            "model": "demo",
            "adapter": ADAPTER,
            "tasks": tasks,
            "guards": guards,
            "methods": STRATEGIES[strategy],
            "trainer": TRAINER,
            "eval_batch_size": 64,
            "out": str(out / strategy),
        }
    )


def _write(path: Path, rows: Rows) -> str:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows.rows)
        path.write_text("".join(lines), "utf-8")
    return str(path)
