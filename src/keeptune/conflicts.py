"""Facts that a later task contradicts: was the old answer kept, the new one taken, or neither?

A fact is a question that two tasks are scored on with different answers. Nothing need be declared:
the examples in the run folder say so, since both tasks ask it in the same words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keeptune.intervals import Array, Estimate, generator, resample, with_interval
from keeptune.records import Cell, Example
from keeptune.results import Column, Results

RIGHT = 0.5  # a score from which on an answer counts as given


@dataclass(frozen=True)
class Answers:
    """What the model answers after one task, in shares that sum to 1.

    Attributes:
        row: Row of R: tasks learned so far.
        old: The earlier task's answer.
        new: The later task's.
        neither: Another one: once the later task was learned, the fact is broken.
    """

    row: int
    old: Estimate
    new: Estimate
    neither: Estimate


@dataclass(frozen=True)
class Conflict:
    """Two tasks that give different answers to the same questions.

    Attributes:
        earlier: The task that was learned first.
        later: The task that contradicts it.
        n: Facts in conflict.
        answers: One a row, from that in which the earlier task was learned to the last.
        untouched: Of the same rows: the share right of the earlier task's other questions.
    """

    earlier: str
    later: str
    n: int
    answers: list[Answers]
    untouched: list[Estimate]


def conflicts(results: Results) -> list[Conflict]:
    """All pairs of tasks learned so far that contradict each other, with 95 % intervals over facts.

    Tasks scored by perplexity give no answers and are passed over.
    """
    tasks = [(i, c) for i, c in enumerate(results.tasks) if c.info.unit == "share"]
    found = [_conflict(a, i, b) for i, a in tasks for k, b in tasks if i < k]
    return [conflict for conflict in found if conflict is not None]


def _conflict(earlier: Column, index: int, later: Column) -> Conflict | None:
    first = index + 1
    pairs = [
        (row, a, b)
        for row, (a, b) in enumerate(zip(earlier.cells, later.cells, strict=True))
        if row >= first and a is not None and b is not None
    ]
    facts = _facts(pairs[0][1], pairs[0][2]) if pairs else []
    if not facts:
        return None
    rng = generator("conflict", earlier.info.eval_sha256, later.info.eval_sha256)
    shares = np.array([_shares(a, b, facts) for _, a, b in pairs])
    means = _draws(shares.reshape(-1, len(facts)), rng).reshape(-1, *shares.shape[:2])
    asked = {id_ for id_, _ in facts}
    return Conflict(
        earlier=earlier.info.name,
        later=later.info.name,
        n=len(facts),
        answers=[
            Answers(
                row,
                *(
                    with_interval(shares[i, kind].mean(), means[:, i, kind], len(facts))
                    for kind in range(3)
                ),
            )
            for i, (row, _, _) in enumerate(pairs)
        ],
        untouched=[_untouched(a, asked) for _, a, _ in pairs],
    )


def _facts(earlier: Cell, later: Cell) -> list[tuple[int, int]]:
    """Ids of the examples of both tasks that ask the same and expect something else."""
    asked: dict[str, Example] = {}
    for example in earlier.examples:
        asked.setdefault(example.prompt, example)
    facts: dict[int, int] = {}
    for example in later.examples:
        old = asked.get(example.prompt)
        if old is not None and _text(old.expected) != _text(example.expected):
            facts.setdefault(old.id, example.id)
    return list(facts.items())


def _text(answer: str) -> str:
    return " ".join(answer.split()).casefold()


def _shares(earlier: Cell, later: Cell, facts: list[tuple[int, int]]) -> Array:
    """[3, facts]: 1 where the answer is the old one, the new one, or neither."""
    olds, news = ({e.id: e.score for e in cell.examples} for cell in (earlier, later))
    scores = np.array([[olds[a], news[b]] for a, b in facts]).T
    is_old = (scores[0] >= RIGHT) & (scores[0] >= scores[1])
    is_new = (scores[1] >= RIGHT) & ~is_old
    return np.array([is_old, is_new, ~(is_old | is_new)], np.float64)


def _untouched(cell: Cell, asked: set[int]) -> Estimate:
    scores = np.array([e.score for e in cell.examples if e.id not in asked])
    if not len(scores):
        return Estimate(None)
    draws = _draws(scores[np.newaxis], generator("untouched", cell.name, len(scores)))
    return with_interval(scores.mean(), draws[:, 0], len(scores))


def _draws(scores: Array, rng: np.random.Generator) -> Array:
    return resample(scores, np.ones_like(scores), rng)
