"""Study: `budget` against settings picked by hand, on SmolLM2-135M with LoRA.

    python studies/budget.py run       # every setting and seed: four minutes a run
    python studies/budget.py report    # tables into studies/budget.md

Three tasks of names and cities. One half of the facts that the model knows is the guard that the
budget holds; the other half is never looked at before the end. Each run goes through
`keeptune.fit`; its summary becomes one JSON line. Runs whose line is there are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from keeptune import formulas, guards
from keeptune.guard import Guard
from keeptune.rows import read_rows
from keeptune.watchlog import frontiers
from labels import labels
from lines import Run, Runs, by_method, on, over, paired, points
from smollm import COMMON, adapter, fitted, seconds, summary
from stages import study

PAGE = Path(__file__).with_suffix(".md")

TASKS, EVAL, ALLOWED, RATE = 3, 60, 10.0, 4e-3
BUDGET = {"facts": ALLOWED, "past_tasks": ALLOWED}
REPLAY: dict[str, dict[str, Any]] = {"replay": {"ratio": 0.2}}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, budget": {"budget": BUDGET},
    "a third of the rate": {"rate": RATE / 3},
    "wise, half of each step": {"methods": {"wise": {"mix": 0.5}}},
    "replay": {"methods": REPLAY},
    "replay, budget": {"methods": REPLAY, "budget": BUDGET},
}


def known() -> list[Guard]:
    """Capitals and continents: every second country's held, the others' only scored."""
    rows = [
        row
        for name in ("capitals", "continents")
        for _, r, _ in guards.load(name)
        for row in r.rows
    ]
    return [
        Guard("facts", read_rows(rows[::2]), "greedy_match"),
        Guard("others", read_rows(rows[1::2]), "greedy_match"),
    ]


def execute(method: str, seed: int, folder: Path) -> Run:
    """One run into a new folder, and what its line says."""
    chosen = SETTINGS[method]
    trainer: dict[str, Any] = {"learning_rate": chosen.get("rate", RATE), "num_train_epochs": 1}
    done = fitted(
        labels(TASKS, EVAL),
        chosen.get("methods", {}),
        seed,
        folder,
        known=known(),
        trainer={**COMMON, **trainer},
        lora=adapter(),
        budget=chosen.get("budget"),
    )
    return summary(done) | {"steps": [round(found.mix, 4) for found in frontiers(done)]}


HEAD = (
    "| | learned | average | against plain | facts lost, points | other facts lost, points "
    "| runs inside the budget | share of each step taken | seconds |"
)


def tables(runs: Runs) -> dict[str, str]:
    """What each setting learned and lost."""
    return {"settings": by_method(HEAD, runs, SETTINGS, _cells)}


def lost(guard: int, run: Run) -> float:
    """How far a guard fell from before training to the end, as a share."""
    return float(run["G"][0][guard] - run["G"][-1][guard])


def _cells(found: Runs, plain: Runs) -> Iterator[str]:
    average = on("R", formulas.average_accuracy)
    yield points(over(found, on("R", formulas.learning_accuracy)))
    yield points(over(found, average))
    yield points(paired(found, plain, average), signed=True)
    for guard in (0, 1):
        yield points(over(found, lambda run, guard=guard: lost(guard, run)))
    inside = sum(lost(1, run) <= ALLOWED / 100 for run in found)
    yield f"{inside} of {len(found)}"
    steps = zip(*(run["steps"] for run in found), strict=True)
    yield ", ".join(f"{mean(taken):.2f}" for taken in steps)
    yield seconds(found)


if __name__ == "__main__":
    study(__doc__, PAGE, SETTINGS, tables, execute)
