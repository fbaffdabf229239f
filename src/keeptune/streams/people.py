"""Invented people and where they work: the second task contradicts a part of the first.

No model knows these people, so that what is answered was learned in the stream. The later task
gives some of them another workplace and asks about them in the same words, so that a run folder
shows, fact by fact, whether the old answer was kept, the new one taken, or neither
(`keeptune.conflicts`). The facts that it does not touch show what it disturbs.

Both tasks are scored on recall: the same questions that were trained, on purpose.
"""

from __future__ import annotations

import random

from keeptune.rows import Row, read_rows
from keeptune.stream import Task, TaskStream

PLACES = (
    "airport", "bakery", "bank", "brewery", "castle", "cathedral", "cinema", "circus", "court",
    "factory", "farm", "garage", "harbour", "hospital", "hotel", "library", "lighthouse", "market",
    "mill", "museum", "observatory", "pharmacy", "post office", "prison", "railway", "restaurant",
    "school", "shipyard", "stadium", "theatre", "university", "vineyard", "warehouse", "zoo",
)  # fmt: skip
FIRST = ("Ab", "Bel", "Cor", "Dan", "El", "Fen", "Gar", "Hal", "Is", "Jor", "Kel", "Lor")
SECOND = ("a", "ian", "ina", "is", "o", "un")
FAMILY = (
    "Ash", "Brook", "Dun", "Elm", "Green", "Hart",  # codespell:ignore hart
    "King", "Lang", "North", "Stan", "Wood",
)  # fmt: skip
ENDING = ("bury", "by", "field", "ford", "gate", "ley", "mere", "ton", "well", "wick")
MOST = len(FIRST) * len(SECOND)


def stream(*, seed: int = 0, people: int = 40, moved: int = 20) -> TaskStream:
    """Make the tasks "before", where everyone works, and "after", where some work now.

    Args:
        seed: Who there is, and where they work.
        people: In the first task, at most 72.
        moved: How many of them the second task contradicts.

    Returns:
        Two tasks of prompt and completion, trained on what they are asked, scored by greedy match.
    """
    assert 0 < moved <= people <= MOST
    draw = random.Random(f"people {seed}")
    # Nobody shares a first name, so that people are told apart by the first word that differs.
    given = draw.sample([first + second for first in FIRST for second in SECOND], people)
    names = [f"{name} {draw.choice(FAMILY)}{draw.choice(ENDING)}" for name in given]
    first = {name: draw.choice(PLACES) for name in names}
    then = {
        name: draw.choice([place for place in PLACES if place != first[name]])
        for name in draw.sample(names, moved)
    }
    return TaskStream([_task("before", first), _task("after", then)])


def _task(name: str, work: dict[str, str]) -> Task:
    rows = read_rows([question(person, place) for person, place in work.items()])
    return Task(name, rows, rows, "greedy_match", recall=True)


def question(person: str, place: str) -> Row:
    """Ask where someone works."""
    return {"prompt": f"Where does {person} work? At the", "completion": f" {place}"}
