"""Study: does a smaller rank forget less? SmolLM2-135M, LoRA of three ranks and all weights.

    python studies/ranks.py run       # every rank, rate and seed: a minute a run
    python studies/ranks.py report    # tables into studies/ranks.md

Two tasks of names and cities, two guards. Each rank is trained at three learning rates, for as many
steps: a rank that learns less also forgets less, so ranks are compared where they have learned as
much. Each run goes through `keeptune.fit`; its summary becomes one JSON line. Runs whose line is
there are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig

from keeptune import formulas
from labels import labels
from lines import Run, Runs, on, over, points, table
from smollm import COMMON, adapter, fitted, kept, summary
from stages import study

PAGE = Path(__file__).with_suffix(".md")

TASKS, EVAL = 2, 60
RATES: dict[str, dict[str, float]] = {
    "rank 2": {"low": 1e-3, "middle": 2e-3, "high": 4e-3},
    "rank 8": {"low": 1e-3, "middle": 2e-3, "high": 4e-3},
    "rank 64": {"low": 1e-3, "middle": 2e-3, "high": 4e-3},
    "all weights": {"low": 1e-4, "middle": 2e-4, "high": 4e-4},
}


def lora(method: str) -> LoraConfig | None:
    """The other studies' adapter with the rank of a name, at an unchanged scale."""
    if method == "all weights":
        return None
    config = adapter()
    config.r = int(method.removeprefix("rank "))
    config.lora_alpha = 2 * config.r
    return config


def execute(rate: str, method: str, seed: int, folder: Path) -> Run:
    """One run into a new folder, and what its line says."""
    trainer: dict[str, Any] = {"learning_rate": RATES[method][rate], "num_train_epochs": 1}
    return summary(
        fitted(
            labels(TASKS, EVAL),
            {},
            seed,
            folder,
            known=kept(),
            trainer={**COMMON, **trainer},
            lora=lora(method),
        )
    )


LEARNED = on("R", formulas.learning_accuracy)
LOST: dict[str, Callable[[Run], float]] = {
    "forgotten": on("R", formulas.forgetting),
    "guards kept": on("G", formulas.share_kept),
}


def tables(runs: Runs) -> dict[str, str]:
    """What each rank learned and lost at each rate, and at an equal score of the new tasks."""
    return {
        "rates": table("| | rate | learned | forgotten | guards kept |", _rows(runs)),
        "equal": table("| | forgotten | guards kept |", _equal(runs)),
    }


def _of(runs: Runs, method: str, rate: str) -> Runs:
    return [run for run in runs if (run["method"], run["rate"]) == (method, rate)]


def _rows(runs: Runs) -> Iterator[list[str]]:
    for method, rates in RATES.items():
        for rate, value in rates.items():
            if found := _of(runs, method, rate):
                figures = [points(over(found, of)) for of in (LEARNED, *LOST.values())]
                yield [method, f"{value:g}", *figures]


def _equal(runs: Runs) -> Iterator[list[str]]:
    """Each seed's curve of three rates, read where every curve of that seed goes through."""
    by_seed = {
        (seed, method): [
            run for rate in rates for run in _of(runs, method, rate) if run["seed"] == seed
        ]
        for seed in sorted({run["seed"] for run in runs})
        for method, rates in RATES.items()
    }
    whole = {key: found for key, found in by_seed.items() if len(found) == len(RATES["rank 2"])}
    for method in RATES:
        cells = [method]
        for of in LOST.values():
            read = [
                {"value": at(found, _common(whole, seed), of)}
                for (seed, name), found in whole.items()
                if name == method
            ]
            cells.append(points(over(read, lambda run: run["value"])))
        yield cells


def _common(curves: dict[tuple[int, str], Runs], seed: int) -> float:
    """The highest score of new tasks that every method of a seed reaches."""
    return min(max(map(LEARNED, found)) for (of, _), found in curves.items() if of == seed)


def at(found: Runs, score: float, of: Callable[[Run], float]) -> float:
    """A value where the score of new tasks is first reached, on lines between the rates.

    Args:
        found: Runs of one seed at rising rates.
        score: Learning accuracy, 0 to 1.
        of: The value.
    """
    learned, values = [LEARNED(run) for run in found], [of(run) for run in found]
    if learned[0] >= score:
        return values[0]
    last = next(i for i, value in enumerate(learned) if value >= score)
    return float(np.interp(score, learned[last - 1 : last + 1], values[last - 1 : last + 1]))


if __name__ == "__main__":
    study(
        __doc__,
        PAGE,
        RATES,
        tables,
        execute,
        axis=("rate", "--rates", ["low", "middle", "high"]),
        shown=("R", "G"),
    )
