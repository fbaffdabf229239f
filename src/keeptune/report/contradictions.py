"""Facts that a later task contradicts, as one bar for each moment of the stream."""

from __future__ import annotations

from dataclasses import dataclass

from keeptune.conflicts import Answers, conflicts
from keeptune.intervals import Estimate
from keeptune.results import Results
from keeptune.wording import estimate_text

WORDS = {"old": "the old answer", "new": "the new answer", "neither": "neither"}


@dataclass(frozen=True)
class Segment:
    """A part of a bar: style, start and width in percent, and its text with the interval."""

    kind: str
    start: float
    width: float
    text: str


@dataclass(frozen=True)
class Bar:
    """All facts in conflict after one task, and the earlier task's other facts as text."""

    after: str
    segments: list[Segment]
    untouched: str


@dataclass(frozen=True)
class Contradiction:
    """Two tasks that contradict each other in n facts."""

    earlier: str
    later: str
    n: int
    bars: list[Bar]

    @property
    def key(self) -> list[tuple[str, str]]:
        """Styles and their words, for the legend."""
        return list(WORDS.items())


def contradictions(results: Results) -> list[Contradiction]:
    """All pairs of tasks with facts in conflict."""
    names = [column.info.name for column in results.tasks]
    return [
        Contradiction(
            found.earlier,
            found.later,
            found.n,
            [
                Bar(names[answers.row - 1], _segments(answers), _text(untouched))
                for answers, untouched in zip(found.answers, found.untouched, strict=True)
            ],
        )
        for found in conflicts(results)
    ]


def _segments(answers: Answers) -> list[Segment]:
    segments, start = [], 0.0
    for kind in WORDS:
        estimate: Estimate = getattr(answers, kind)
        width = 100 * (estimate.value or 0.0)
        segments.append(Segment(kind, round(start, 3), round(width, 3), _text(estimate)))
        start += width
    return segments


def _text(estimate: Estimate) -> str:
    return "–" if estimate.value is None else estimate_text(estimate, "share")
