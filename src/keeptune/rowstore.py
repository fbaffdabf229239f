"""Tokenised rows in about two bytes a token.

Ids are 16 bits where all are below 65,536. Labels of a language model are the ids themselves or
ignored, so that one bit a token says which; those of a classifier are one number a row. Where a row
begins is summed from the lengths since the last of every 64th row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from keeptune.errors import DataError
from keeptune.method import IGNORED

COLUMNS = ["input_ids", "labels"]
EVERY = 64  # rows between two positions that are kept
CHUNK = 8192  # rows handled at a time, which bounds what is needed beside the rows themselves
Whole = NDArray[np.int64]
Numbers = NDArray[Any]


@dataclass(frozen=True)
class Rows:
    """Rows that are not changed, only replaced as a whole.

    Attributes:
        ids: uint16 or int32 [T], all rows' token ids in a line.
        lengths: uint16 or int32 [R], tokens of each row.
        starts: int64 [R / 64 rounded up], where every 64th row begins in `ids`.
        labels: uint8 [T / 8 rounded up], a bit for each token that is an answer; or int32 [R],
            classes; or int32 [T], labels that are something else.
        kind: Which of them: "answers", "classes" or "tokens".
    """

    ids: Numbers
    lengths: Numbers
    starts: Whole
    labels: Numbers
    kind: str

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, Numbers]:
        """All arrays by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "kind"}

    @classmethod
    def none(cls) -> Rows:
        """No rows."""
        empty = np.empty(0, np.uint16)
        return cls(empty, empty, np.empty(0, np.int64), np.empty(0, np.uint8), "answers")

    @classmethod
    def of(cls, dataset: Dataset) -> Rows:
        """The rows of a tokenised data set.

        Raises:
            DataError: A row has more labels than tokens, or fewer.
        """
        parts = dataset.select_columns(COLUMNS).with_format("arrow").iter(CHUNK)
        return _joined([_from_table(part) for part in parts])

    def tokens(self, positions: NDArray[np.int64] | None = None) -> Whole:
        """Lengths of these rows, or of all."""
        lengths = self.lengths if positions is None else self.lengths[positions]
        return lengths.astype(np.int64)

    def classes(self) -> Whole | None:
        """The class of each row, or None for rows of a language model."""
        return self.labels.astype(np.int64) if self.kind == "classes" else None

    def take(self, positions: Whole) -> Rows:
        """The rows at these positions, in that order."""
        at = [self._take(positions[i : i + CHUNK]) for i in range(0, len(positions), CHUNK)]
        return _joined(at)

    def joined(self, others: Rows) -> Rows:
        """These rows and then others."""
        return _joined([self, others])

    def dataset(self, like: Dataset) -> Dataset:
        """All rows, with the types of `like`."""
        ends = np.concatenate([[0], np.cumsum(self.tokens())])
        columns = {"input_ids": _lists(ends, self.ids)}
        if self.kind == "classes":
            columns["labels"] = pa.array(self.labels)
        else:
            columns["labels"] = _lists(ends, self._flat_labels())
        features = like.select_columns(COLUMNS).features
        return Dataset(pa.table(columns).cast(features.arrow_schema))

    def _begins(self, positions: Whole) -> Whole:
        """Where these rows begin in `ids`."""
        first = positions // EVERY * EVERY
        before = first[:, None] + np.arange(EVERY)
        lengths = self.lengths[np.minimum(before, len(self) - 1)].astype(np.int64)
        past: Whole = (lengths * (before < positions[:, None])).sum(1)
        return self.starts[positions // EVERY] + past

    def _take(self, positions: Whole) -> Rows:
        lengths = self.tokens(positions)
        shift = self._begins(positions) - (np.cumsum(lengths) - lengths)
        at = np.repeat(shift, lengths) + np.arange(lengths.sum())
        if self.kind == "answers":
            labels = np.packbits(self.labels[at >> 3] >> (7 - (at & 7)) & 1)
        else:
            labels = self.labels[positions if self.kind == "classes" else at]
        return _rows(self.ids[at], lengths, labels, self.kind)

    def _is_answer(self) -> NDArray[np.bool_]:
        return np.unpackbits(self.labels, count=len(self.ids)).view(bool)

    def _flat_labels(self) -> Numbers:
        if self.kind == "tokens":
            return self.labels
        return np.where(self._is_answer(), self.ids, np.int32(IGNORED)).astype(np.int32)


def _rows(ids: Numbers, lengths: Numbers, labels: Numbers, kind: str) -> Rows:
    begins = np.cumsum(lengths) - lengths
    return Rows(ids, _small(lengths), begins[::EVERY].astype(np.int64), labels, kind)


def _small(values: Numbers) -> Numbers:
    """In 16 bits where they fit."""
    fit = not len(values) or (values.min() >= 0 and values.max() <= np.iinfo(np.uint16).max)
    return values.astype(np.uint16 if fit else np.int32, copy=False)


def _from_table(table: Any) -> Rows:
    ids, lengths = _flat(table["input_ids"])
    if not pa.types.is_list(table["labels"].type) and not pa.types.is_large_list(
        table["labels"].type
    ):
        classes = table["labels"].to_numpy().astype(np.int32)
        return _rows(_small(ids), lengths, classes, "classes")
    labels, label_lengths = _flat(table["labels"])
    if not np.array_equal(lengths, label_lengths):
        raise DataError("A row has not as many labels as tokens. Give every token one label.")
    answers = labels != IGNORED
    if np.array_equal(labels[answers], ids[answers]):
        return _rows(_small(ids), lengths, np.packbits(answers), "answers")
    return _rows(_small(ids), lengths, labels.astype(np.int32), "tokens")


def _flat(column: Any) -> tuple[Numbers, Whole]:
    """Values in a line, and how many each row has."""
    lists = pa.concat_arrays(column.chunks)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return values, lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)


def _lists(ends: Whole, values: Numbers) -> Any:
    return pa.LargeListArray.from_arrays(pa.array(ends), pa.array(values))


def _joined(parts: list[Rows]) -> Rows:
    parts = [part for part in parts if len(part)]
    if len(parts) < 2:
        return parts[0] if parts else Rows.none()
    ids = np.concatenate([part.ids for part in parts])
    lengths = np.concatenate([part.tokens() for part in parts])
    kinds = {part.kind for part in parts}
    if kinds == {"answers"}:
        answers = np.concatenate([part._is_answer() for part in parts])
        return _rows(ids, lengths, np.packbits(answers), "answers")
    if kinds == {"classes"}:
        return _rows(ids, lengths, np.concatenate([part.labels for part in parts]), "classes")
    if "classes" in kinds:
        raise DataError("Rows of a classifier and of a language model cannot be kept together.")
    labels = np.concatenate([part._flat_labels() for part in parts])
    return _rows(ids, lengths, labels, "tokens")
