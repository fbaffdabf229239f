"""Answers that were right and are wrong now, and the other way round."""

from __future__ import annotations

from dataclasses import dataclass

from keeptune.records import Example
from keeptune.results import Column, Results

RIGHT = 0.5


@dataclass(frozen=True)
class Flip:
    """One example that was right and is wrong now; texts are cut to a readable length."""

    prompt: str
    expected: str
    was: str
    now: str


@dataclass(frozen=True)
class Flips:
    """The examples of one task or guard whose answer changed sides.

    Attributes:
        name: The task or guard.
        kind: "task" or "guard".
        since: What now is compared with.
        n: Examples compared.
        lost: Right then, wrong now.
        won: Wrong then, right now.
        shown: Some of the lost ones, in row order.
    """

    name: str
    kind: str
    since: str
    n: int
    lost: int
    won: int
    shown: list[Flip]


def flips(results: Results, limit: int) -> list[Flips]:
    """What changed sides: tasks since they were learned, guards since before training.

    Args:
        results: The run.
        limit: Most examples shown of one task or guard.
    """
    pairs = [(c, i + 1, "since it was learned") for i, c in enumerate(results.tasks)]
    pairs += [(c, 0, "since before training") for c in results.guards]
    found = [_flips(column, since, words, limit) for column, since, words in pairs]
    return [f for f in found if f is not None]


def _flips(column: Column, since: int, words: str, limit: int) -> Flips | None:
    last = len(column.cells) - 1
    then, now = (column.cells[row] if 0 <= row <= last else None for row in (since, last))
    if since >= last or then is None or now is None or column.info.unit != "share":
        return None
    answers = {e.id: e for e in now.examples}
    pairs = [(e, answers[e.id]) for e in then.examples if e.id in answers]
    lost = [(a, b) for a, b in pairs if a.score >= RIGHT > b.score]
    won = sum(a.score < RIGHT <= b.score for a, b in pairs)
    if not pairs:
        return None
    # Under `privacy: strict` results have no texts.
    shown = [_flip(a, b) for a, b in lost[:limit] if a.prompt or a.expected]
    kind, name = column.kind, column.info.name
    return Flips(name, kind, words, len(pairs), len(lost), won, shown)


def _flip(then: Example, now: Example) -> Flip:
    return Flip(
        # the question stands at the end of a prompt
        prompt=cut(then.prompt, 180, from_left=True),
        expected=cut(then.expected, 90),
        was=cut(then.answer, 90),
        now=cut(now.answer, 90),
    )


def cut(text: str, length: int, *, from_left: bool = False) -> str:
    """The text, or its first (last) `length` characters with an ellipsis."""
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    return "…" + text[-length:].lstrip() if from_left else text[:length].rstrip() + "…"
