"""Rows that a model wrote, as long as a task needs them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from keeptune.buffer import Buffer
from keeptune.method import IGNORED, Context, State
from keeptune.methods._writing.sampling import Ids
from keeptune.methods._writing.whole_rows import Form, Row
from keeptune.rowstore import COLUMNS

NOBODY = -1


class Stock:
    """The rows of one task's rehearsal, by who they stand for; a state, and empty afterwards.

    Attributes:
        of: Index of the task that they were written for; -1 for none.
    """

    def __init__(self) -> None:
        self.of = NOBODY
        self._rows = Buffer(None)

    def fill(self, ctx: Context, rows: Mapping[str, Sequence[Row]]) -> None:
        """Take rows in, by name."""
        self.of = ctx.index
        for name, some in rows.items():
            self._rows.add(dataset_of(some, ctx.dataset), name, ctx.random("stock"))

    def rows(self, like: Dataset) -> dict[str, list[Row]]:
        """All rows by name."""
        found, begin = {}, 0
        for name, count in self._rows.counts().items():
            positions = list(range(begin, begin + count))
            found[name] = rows_of(self._rows.rows(positions, like))
            begin += count
        return found

    def state(self) -> State:
        """The rows."""
        return State(self._rows.state().tensors, {"of": self.of})

    def restore(self, state: State) -> None:
        """Take back what `state` gave; further tensors in it are passed over."""
        self.of = int(state.values["of"])
        self._rows.restore(state)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self._rows.nbytes()


def rows_of(dataset: Dataset) -> list[Row]:
    """Tokenised rows one by one."""
    columns = dataset.select_columns(COLUMNS).to_dict()
    return [Row(*pair) for pair in zip(columns["input_ids"], columns["labels"], strict=True)]


def dataset_of(rows: Iterable[Row], like: Dataset) -> Dataset:
    """Rows as a data set with the types of another; both columns, no others."""
    rows = list(rows)
    columns: dict[str, Any] = {
        "input_ids": [row.input_ids for row in rows],
        "labels": [row.labels for row in rows],
    }
    return Dataset.from_dict(columns, features=like.select_columns(COLUMNS).features)


def learned(labels: Iterable[Ids]) -> int:
    """Tokens that have a loss; the first of a row never has one."""
    return sum(label != IGNORED for row in labels for label in row[1:])


def as_texts(rows: Iterable[Row], form: Form, longest: int) -> list[Row]:
    """The whole texts of rows, learned from their first token on; too long ones are left out."""
    texts = [text for row in rows if (text := form.text(row)) and len(text) <= longest]
    return [Row(text, list(text)) for text in texts]


def shared_out(total: int, names: Sequence[str]) -> dict[str, int]:
    """A number shared out evenly; the first ones get one more where it does not go up."""
    each = np.full(len(names), total // max(len(names), 1))
    each[: total - int(each.sum())] += 1
    return dict(zip(names, each.tolist(), strict=True))
