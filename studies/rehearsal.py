"""Study: rehearsal on SmolLM2-135M, with old rows, with rows the model writes, and with none.

    python studies/rehearsal.py run       # every method and seed: two minutes a run
    python studies/rehearsal.py report    # tables into studies/rehearsal.md

Three tasks of rows that a model can make up: names to their language, cities to their continent,
names to what they name. Guards: capitals, continents of countries, and a few chats. Each run goes
through `keeptune.fit`; its summary becomes one JSON line. Runs whose line is there are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keeptune.folder import RunFolder
from keeptune.guard import Guard
from keeptune.rows import read_rows
from labels import labels
from lines import Run, Runs, by_method
from smollm import COMMON, adapter, fitted, kept, seconds, shares, summary
from stages import study

PAGE = Path(__file__).with_suffix(".md")

TASKS, EVAL = 3, 60
RATIOS = (0.005, 0.02, 0.05, 0.1, 0.2)
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "pseudo": {"pseudo_replay": {"ratio": 0.2}},
    "pseudo, distilled": {"pseudo_replay": {"ratio": 0.2, "distil": 1.0}},
    "pseudo and chats": {"pseudo_replay": {"ratio": 0.2, "general": 0.05, "longest": 64}},
    **{f"replay {ratio:g}": {"replay": {"ratio": ratio}} for ratio in RATIOS},
    "lwf": {"lwf": {}},
}
# At this rate plain training of another seed learned most, and forgot.
TRAINER: dict[str, Any] = {**COMMON, "learning_rate": 4e-3, "num_train_epochs": 1}


# -- one run --------------------------------------------------------------------------------------


def guards() -> list[Guard]:
    """Capitals and continents of countries; and how likely ordinary chats are to the model."""
    return [*kept(), Guard("chats", read_rows(TALKS), "perplexity")]


TALKS = [
    {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }
    for question, answer in (
        (
            "What is a good way to learn a language?",
            "Practise a little every day, and speak early.",
        ),
        ("How do I boil an egg?", "Put it into boiling water for eight minutes, then cool it."),
        ("Write one sentence about the sea.", "The sea was calm, and the boats lay still."),
        ("Why do leaves fall in autumn?", "Trees drop their leaves to save water in winter."),
        ("Give me a tip for better sleep.", "Go to bed at the same time every night."),
        ("What is a library?", "A library is a place where people can read and borrow books."),
        ("How can I thank a friend?", "Tell them what they did for you, and that it mattered."),
        ("Explain what rain is.", "Rain is water that falls from clouds in drops."),
    )
]


def execute(method: str, seed: int, folder: Path) -> Run:
    """One run into a new folder, and what its line says."""
    return summed_up(
        fitted(
            labels(TASKS, EVAL),
            METHODS[method],
            seed,
            folder,
            known=guards(),
            trainer=TRAINER,
            lora=adapter(),
        )
    )


def summed_up(folder: RunFolder) -> Run:
    """As in the study of the regularisation family, with the chats' perplexity apart."""
    run = summary(folder)
    *shares, chats = zip(*run["G"], strict=True)
    return run | {"G": np.array(shares).T.tolist(), "chats": list(chats)}


# -- tables ---------------------------------------------------------------------------------------


HEAD = (
    "| | learned | average | against plain | forgotten | guards kept | against plain "
    "| chats' perplexity | rows | texts | seconds |"
)


def tables(runs: Runs) -> dict[str, str]:
    """What each method learned, forgot and kept."""
    return {"labels": by_method(HEAD, runs, METHODS, _cells)}


def _cells(found: Runs, plain: Runs) -> Iterator[str]:
    def evidence(*keys: str) -> str:
        """What the methods showed for the last task under the first of these keys they have."""
        values = [v for run in found for v in run["evidence"][-1].values()]
        shown = [v[key] for v in values for key in keys if key in v]
        return f"{np.mean(shown):.0f}" if shown else ""

    yield from shares(found, plain)
    # Of perplexities the geometric mean: one run in pieces would be all of an arithmetic one.
    first, last = (np.exp(np.mean(np.log([run["chats"][row] for run in found]))) for row in (0, -1))
    yield f"{first:.1f} → {last:.1f}"
    yield evidence("rows_generated", "rows_replayed")
    yield evidence("texts_written")
    yield seconds(found)


if __name__ == "__main__":
    study(__doc__, PAGE, METHODS, tables, execute)
