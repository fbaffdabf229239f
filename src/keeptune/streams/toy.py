"""Three small tasks on strings of letters, made on the spot: for trying things out and for tests.

Each maps a word of three letters from a to h to one output. The inputs of the tasks look alike
and only the first word of the prompt tells them apart, so that a model trained on them one after
another forgets.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product

from keeptune.rows import read_rows
from keeptune.stream import Task, TaskStream

LETTERS = "abcdefgh"
MAPPINGS: dict[str, Callable[[str], str]] = {
    "reverse": lambda word: word[::-1],
    "next": lambda word: "".join(LETTERS[(LETTERS.index(c) + 1) % len(LETTERS)] for c in word),
    "sort": lambda word: "".join(sorted(word)),
}
WORDS = ["".join(letters) for letters in product(LETTERS, repeat=3)]


def stream(*, seed: int = 0, train: int = 200, evaluation: int = 100) -> TaskStream:
    """Make the tasks reverse, next and sort.

    Args:
        seed: Which words are drawn.
        train: Training rows a task.
        evaluation: Evaluation rows a task, of words that the task does not train on; together
            with `train` at most 512.

    Returns:
        Three tasks of prompt and completion, scored by exact match.
    """
    return TaskStream([_task(name, seed, train, evaluation) for name in MAPPINGS])


def _task(name: str, seed: int, train: int, evaluation: int) -> Task:
    words = random.Random(f"{seed} {name}").sample(WORDS, train + evaluation)
    rows = [{"prompt": f"{name} {w}:", "completion": f" {MAPPINGS[name](w)}"} for w in words]
    return Task(name, read_rows(rows[:train]), read_rows(rows[train:]), "exact_match")
