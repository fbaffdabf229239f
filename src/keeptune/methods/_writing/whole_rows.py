"""A whole row as one text that a model can learn to write, and back again.

    Example of TASK: question ◊ answer ◊

◊ is a mark: a short text that is one token and stands in no row. It says where the answer begins
and where the row ends, so that what is written is a row or is seen to be none. Words that are there
already serve for both; no token is added to the vocabulary and no embedding is resized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keeptune.method import IGNORED

MARKS = (" ||", "||", "|", "~")
Ids = list[int]


@dataclass(frozen=True)
class Row:
    """A tokenised row; labels are -100 where nothing is learned."""

    input_ids: Ids
    labels: Ids


@dataclass(frozen=True)
class Form:
    """How the rows of a task are written as texts.

    Attributes:
        prefix: Ids that every text of the task begins with.
        mark: Ids of the mark.
    """

    prefix: Ids
    mark: Ids

    @classmethod
    def of(cls, task: str, tokenizer: Any) -> Form:
        """The form of a task's rows."""
        prefix = list(tokenizer.encode(f"Example of {task}:"))
        if prefix[-1] == tokenizer.eos_token_id:
            prefix.pop()
        marks = [list(tokenizer.encode(mark, add_special_tokens=False)) for mark in MARKS]
        return cls(prefix, min(marks, key=len))

    def text(self, row: Row) -> Ids | None:
        """The row as one text; None if it holds the mark, so that its parts could not be told."""
        if _find(row.input_ids, self.mark, 0) is not None:
            return None
        begin, end = last_answer(row.labels)
        asked, answered = row.input_ids[:begin], row.input_ids[begin:end]
        return [*self.prefix, *asked, *self.mark, *answered, *self.mark]

    def is_whole(self, written: Ids) -> bool:
        """Whether what was written after the prefix has both marks."""
        first = _find(written, self.mark, 0)
        return first is not None and _find(written, self.mark, first + len(self.mark)) is not None

    def row(self, written: Ids) -> Row | None:
        """The row that was written after the prefix, or None where it is none.

        It is one if both marks are there and a token to learn stands between them.
        """
        begins = _find(written, self.mark, 0)
        if begins is None:
            return None
        ends = _find(written, self.mark, begins + len(self.mark))
        if ends is None:
            return None
        asked, answered = written[:begins], written[begins + len(self.mark) : ends]
        # The very first token of a row has no loss: nothing predicts it.
        if len(answered) + min(len(asked), 1) < 2:
            return None
        return Row(asked + answered, [IGNORED] * len(asked) + answered)


def last_answer(labels: Ids) -> tuple[int, int]:
    """Where the last answer of a row begins and ends: the last labels in a line."""
    end = max((i + 1 for i, label in enumerate(labels) if label != IGNORED), default=0)
    return max((i + 1 for i in range(end) if labels[i] == IGNORED), default=0), end


def _find(ids: Ids, part: Ids, start: int) -> int | None:
    last = len(ids) - len(part)
    return next((i for i in range(start, last + 1) if ids[i : i + len(part)] == part), None)
