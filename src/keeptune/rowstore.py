"""Tokenised rows in about two bytes a token.

Ids are 16 bits where all are below 65,536. Labels of a language model are the ids themselves or
ignored, so that one bit a token says which; those of a classifier are one number a row. Where a row
begins is summed from the lengths since the last of every 64th row. What a method keeps of a row
besides, such as the model's outputs, lies beside it in the same manner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
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
class Ragged:
    """Values of which each row has its own number; not changed, only replaced as a whole.

    Attributes:
        values: [T, ...], all rows' values in a line.
        lengths: uint16 or int32 [R], how many each row has.
        starts: int64 [R / 64 rounded up], where every 64th row begins in `values`.
    """

    values: Numbers
    lengths: Numbers
    starts: Whole

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, values: Numbers, lengths: Numbers) -> Ragged:
        """Values in a line, and how many each row has."""
        begins = np.cumsum(lengths) - lengths
        return cls(values, _small(lengths), begins[::EVERY].astype(np.int64))

    def counts(self, positions: Whole | None = None) -> Whole:
        """How many values these rows have, or all."""
        lengths = self.lengths if positions is None else self.lengths[positions]
        return lengths.astype(np.int64)

    def where(self, positions: Whole) -> Whole:
        """Where the values of these rows lie, one row after another."""
        lengths = self.counts(positions)
        shift = self._begins(positions) - (np.cumsum(lengths) - lengths)
        return np.repeat(shift, lengths) + np.arange(lengths.sum())

    def take(self, positions: Whole) -> Ragged:
        """The rows at these positions, in that order."""
        return Ragged.of(self.values[self.where(positions)], self.counts(positions))

    def _begins(self, positions: Whole) -> Whole:
        """Where these rows begin in `values`."""
        first = positions // EVERY * EVERY
        before = first[:, None] + np.arange(EVERY)
        lengths = self.lengths[np.minimum(before, len(self) - 1)].astype(np.int64)
        past: Whole = (lengths * (before < positions[:, None])).sum(1)
        return self.starts[positions // EVERY] + past


@dataclass(frozen=True)
class Rows:
    """Rows that are not changed, only replaced as a whole.

    Attributes:
        ids: uint16 or int32, token ids.
        labels: uint8 [T / 8 rounded up], a bit for each token that is an answer; or int32 [R],
            classes; or int32 [T], labels that are something else.
        kind: Which of them: "answers", "classes" or "tokens".
        extras: What else is kept of every row, by name.
    """

    ids: Ragged
    labels: Numbers
    kind: str
    extras: Mapping[str, Ragged] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, Numbers]:
        """All arrays by name."""
        parts = {"ids": self.ids} | {f"extras/{name}": part for name, part in self.extras.items()}
        return {"labels": self.labels} | {
            f"{name}/{f.name}": getattr(part, f.name)
            for name, part in parts.items()
            for f in fields(Ragged)
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Numbers], kind: str) -> Rows:
        """Rows of what `arrays` gave."""
        names = [name.removesuffix("/values") for name in arrays if name.endswith("/values")]
        parts = {
            name: Ragged(*(arrays[f"{name}/{f.name}"] for f in fields(Ragged))) for name in names
        }
        ids = parts.pop("ids")
        extras = {name.removeprefix("extras/"): part for name, part in parts.items()}
        return cls(ids, arrays["labels"], kind, extras)

    @classmethod
    def none(cls) -> Rows:
        """No rows."""
        empty = np.empty(0, np.uint16)
        return cls(Ragged.of(empty, empty), np.empty(0, np.uint8), "answers")

    @classmethod
    def of(cls, dataset: Dataset) -> Rows:
        """The rows of a tokenised data set.

        Raises:
            DataError: A row has more labels than tokens, or fewer.
        """
        parts = dataset.select_columns(COLUMNS).with_format("arrow").iter(CHUNK)
        return joined([_from_table(part) for part in parts])

    def tokens(self, positions: Whole | None = None) -> Whole:
        """Lengths of these rows, or of all."""
        return self.ids.counts(positions)

    def classes(self) -> Whole | None:
        """The class of each row, or None for rows of a language model."""
        return self.labels.astype(np.int64) if self.kind == "classes" else None

    def with_extras(self, extras: Mapping[str, Sequence[Numbers]]) -> Rows:
        """These rows with more kept of each: for every name an array [m, ...] for each row."""
        own = {}
        for name, arrays in extras.items():
            assert len(arrays) == len(self), f"{name}: {len(arrays)} arrays, {len(self)} rows"
            lengths = np.array([len(array) for array in arrays], np.int64)
            own[name] = Ragged.of(np.concatenate(arrays), lengths)
        return replace(self, extras=own)

    def take(self, positions: Whole) -> Rows:
        """The rows at these positions, in that order."""
        at = [self._take(positions[i : i + CHUNK]) for i in range(0, len(positions), CHUNK)]
        return joined(at)

    def dataset(self, like: Dataset) -> Dataset:
        """All rows, with the types of `like`."""
        ends = np.concatenate([[0], np.cumsum(self.tokens())])
        columns = {"input_ids": _lists(ends, self.ids.values)}
        if self.kind == "classes":
            columns["labels"] = pa.array(self.labels)
        else:
            columns["labels"] = _lists(ends, self._flat_labels())
        features = like.select_columns(COLUMNS).features
        return Dataset(pa.table(columns).cast(features.arrow_schema))

    def _take(self, positions: Whole) -> Rows:
        at = self.ids.where(positions)
        if self.kind == "answers":
            labels = np.packbits(self.labels[at >> 3] >> (7 - (at & 7)) & 1)
        else:
            labels = self.labels[positions if self.kind == "classes" else at]
        ids = Ragged.of(self.ids.values[at], self.tokens(positions))
        extras = {name: part.take(positions) for name, part in self.extras.items()}
        return Rows(ids, labels, self.kind, extras)

    def _is_answer(self) -> NDArray[np.bool_]:
        return np.unpackbits(self.labels, count=len(self.ids.values)).view(bool)

    def _flat_labels(self) -> Numbers:
        if self.kind == "tokens":
            return self.labels
        return np.where(self._is_answer(), self.ids.values, np.int32(IGNORED)).astype(np.int32)


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of all of them, one after another.

    Raises:
        DataError: Some are a classifier's, some a language model's.
    """
    parts = [part for part in parts if len(part)]
    if len(parts) < 2:
        return parts[0] if parts else Rows.none()
    names = list(parts[0].extras)
    assert all(list(part.extras) == names for part in parts), "not the same extras for all rows"
    ids = _in_line([part.ids for part in parts])
    extras = {name: _in_line([part.extras[name] for part in parts]) for name in names}
    kinds = {part.kind for part in parts}
    if kinds == {"answers"}:
        answers = np.packbits(np.concatenate([part._is_answer() for part in parts]))
        return Rows(ids, answers, "answers", extras)
    if kinds == {"classes"}:
        return Rows(ids, np.concatenate([part.labels for part in parts]), "classes", extras)
    if "classes" in kinds:
        raise DataError("Rows of a classifier and of a language model cannot be kept together.")
    labels = np.concatenate([part._flat_labels() for part in parts])
    return Rows(ids, labels, "tokens", extras)


def _in_line(parts: Sequence[Ragged]) -> Ragged:
    values = np.concatenate([part.values for part in parts])
    return Ragged.of(values, np.concatenate([part.counts() for part in parts]))


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
        return Rows(Ragged.of(_small(ids), lengths), classes, "classes")
    labels, label_lengths = _flat(table["labels"])
    if not np.array_equal(lengths, label_lengths):
        raise DataError("A row has not as many labels as tokens. Give every token one label.")
    answers = labels != IGNORED
    if np.array_equal(labels[answers], ids[answers]):
        return Rows(Ragged.of(_small(ids), lengths), np.packbits(answers), "answers")
    return Rows(Ragged.of(_small(ids), lengths), labels.astype(np.int32), "tokens")


def _flat(column: Any) -> tuple[Numbers, Whole]:
    """Values in a line, and how many each row has."""
    lists = pa.concat_arrays(column.chunks)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return values, lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)


def _lists(ends: Whole, values: Numbers) -> Any:
    return pa.LargeListArray.from_arrays(pa.array(ends), pa.array(values))
