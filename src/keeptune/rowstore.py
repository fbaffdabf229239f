"""Tokenised rows in about two bytes a token.

Ids are 16 bits where all are below 65,536. Labels of a language model are the ids themselves or
ignored, so that one bit a token says which; those of a classifier are one number a row. Where a row
begins is summed from the lengths since the last of every 16th row. What a method keeps of a row
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
EVERY = 16  # rows between two positions that are kept
CHUNK = 8192  # rows handled at a time, which bounds what is needed beside the rows themselves
Whole = NDArray[np.int64]
Numbers = NDArray[Any]


@dataclass(frozen=True)
class Ragged:
    """Values of which each row has its own number; not changed, only replaced as a whole.

    Attributes:
        values: [T, ...], all rows' values in a line.
        lengths: uint16 or int32 [R], how many each row has.
        starts: int64 [R / 16 rounded up], where every 16th row begins in `values`.
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

    def span(self, row: int) -> tuple[int, int]:
        """Where a row begins and ends in `values`."""
        first = row // EVERY * EVERY
        begin = self.starts.item(row // EVERY) + int(self.lengths[first:row].sum(dtype=np.int64))
        return begin, begin + self.lengths.item(row)

    def begins(self, positions: Whole) -> Whole:
        """Where these rows begin in `values`."""
        first = positions // EVERY * EVERY
        before = first[:, None] + np.arange(EVERY)
        lengths = self.lengths[np.minimum(before, len(self) - 1)].astype(np.int64)
        past: Whole = (lengths * (before < positions[:, None])).sum(1)
        return self.starts[positions // EVERY] + past


@dataclass(frozen=True)
class Mapped:
    """As `Ragged`, where every row's place is known, which costs no memory in a file.

    Attributes:
        values: [T, ...], all rows' values in a line.
        offsets: int32 [R + 1], where each row begins, and where the last one ends.
    """

    values: Numbers
    offsets: Numbers

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def counts(self, positions: Whole | None = None) -> Whole:
        """How many values these rows have, or all."""
        if positions is None:
            return np.diff(self.offsets).astype(np.int64)
        return (self.offsets[positions + 1] - self.offsets[positions]).astype(np.int64)

    def span(self, row: int) -> tuple[int, int]:
        """Where a row begins and ends in `values`."""
        return self.offsets.item(row), self.offsets.item(row + 1)

    def begins(self, positions: Whole) -> Whole:
        """Where these rows begin in `values`."""
        return self.offsets[positions].astype(np.int64)


Column = Ragged | Mapped


def where(column: Column, positions: Whole) -> Whole:
    """Where the values of these rows lie, one row after another."""
    lengths = column.counts(positions)
    shift = column.begins(positions) - (np.cumsum(lengths) - lengths)
    return np.repeat(shift, lengths) + np.arange(lengths.sum())


def _taken(column: Column, positions: Whole) -> Ragged:
    """The rows at these positions, in that order."""
    return Ragged.of(column.values[where(column, positions)], column.counts(positions))


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

    ids: Column
    labels: Numbers
    kind: str
    extras: Mapping[str, Column] = field(default_factory=dict)

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
            for f in fields(part)
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
    def of(cls, table: Any) -> Rows:
        """The rows of an Arrow table with the columns of tokenised rows.

        Raises:
            DataError: A row has more labels than tokens, or fewer.
        """
        ids, lengths = _flat(table["input_ids"])
        tokens = Ragged.of(_small(ids), lengths)
        if not _is_list(table["labels"].type):
            return cls(tokens, table["labels"].to_numpy().astype(np.int32), "classes")
        labels, label_lengths = _flat(table["labels"])
        if not np.array_equal(lengths, label_lengths):
            raise DataError("A row has not as many labels as tokens. Give every token one label.")
        answers = labels != IGNORED
        if ((labels == ids) | ~answers).all():
            return cls(tokens, np.packbits(answers, bitorder="little"), "answers")
        return cls(tokens, labels.astype(np.int32), "tokens")

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
        if len(positions) == len(self) and (positions == np.arange(len(self))).all():
            return self
        at = [self._take(positions[i : i + CHUNK]) for i in range(0, len(positions), CHUNK)]
        return joined(at)

    def besides(self, row: int) -> dict[str, Numbers]:
        """What is kept of one row besides, by name: [m, ...]."""
        return {name: part.values[slice(*part.span(row))] for name, part in self.extras.items()}

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
        at = where(self.ids, positions)
        if self.kind == "answers":
            labels = np.packbits(self.labels[at >> 3] >> (at & 7) & 1, bitorder="little")
        else:
            labels = self.labels[positions if self.kind == "classes" else at]
        ids = Ragged.of(self.ids.values[at], self.tokens(positions))
        extras = {name: _taken(part, positions) for name, part in self.extras.items()}
        return Rows(ids, labels, self.kind, extras)

    def _is_answer(self) -> NDArray[np.bool_]:
        bits = np.unpackbits(self.labels, count=len(self.ids.values), bitorder="little")
        return bits.view(bool)

    def _flat_labels(self) -> Numbers:
        if self.kind == "tokens":
            return self.labels
        return np.where(self._is_answer(), self.ids.values, np.int32(IGNORED)).astype(np.int32)


def examples(places: Sequence[tuple[Rows, int]]) -> list[dict[str, Any]]:
    """Rows as a collator takes them: `input_ids` int64 [m], `labels` int64 [m] or a number.

    Args:
        places: Rows of one kind, and which of them; at least one.
    """
    # Few calls for all of them: each call of numpy costs as much as a row's numbers.
    spans = _spans(places)
    spanned = [(rows, *span) for (rows, _), span in zip(places, spans, strict=True)]
    ids = np.concatenate([rows.ids.values[begin:end] for rows, begin, end in spanned])
    ids = ids.astype(np.int64)
    if places[0][0].kind == "classes":
        labels = np.array([rows.labels[row] for rows, row in places], np.int64)
    elif any(rows.kind == "tokens" for rows, _ in places):
        flat = [rows.take(np.array([row]))._flat_labels() for rows, row in places]
        labels = np.concatenate(flat).astype(np.int64)
    else:
        parts = [rows.labels[begin >> 3 : (end + 7) >> 3] for rows, begin, end in spanned]
        bits = np.unpackbits(np.concatenate(parts), bitorder="little")
        own, at = [], 0
        for part, (begin, end) in zip(parts, spans, strict=True):
            at += begin & 7
            own.append(bits[at : at + end - begin])
            at += 8 * len(part) - (begin & 7)
        labels = np.where(np.concatenate(own), ids, IGNORED)
    found, at = [], 0
    for number, (begin, end) in enumerate(spans):
        to = at + end - begin
        label = labels[number] if places[0][0].kind == "classes" else labels[at:to]
        found.append({"input_ids": ids[at:to], "labels": label})
        at = to
    return found


def _spans(places: Sequence[tuple[Rows, int]]) -> list[tuple[int, int]]:
    """Where each of these rows begins and ends."""
    first = places[0][0]
    if any(rows is not first for rows, _ in places):
        return [rows.ids.span(row) for rows, row in places]
    positions = np.array([row for _, row in places])
    begins = first.ids.begins(positions)
    ends = begins + first.ids.counts(positions)
    return list(zip(begins.tolist(), ends.tolist(), strict=True))


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of all of them, one after another.

    Raises:
        DataError: Some are a classifier's, some a language model's.
    """
    parts = [part for part in parts if len(part)]
    if len(parts) < 2:
        return parts[0] if parts else Rows.none()
    names = sorted(parts[0].extras)  # restored ones have any order
    assert all(sorted(part.extras) == names for part in parts), "not the same extras for all rows"
    ids = _in_line([part.ids for part in parts])
    extras = {name: _in_line([part.extras[name] for part in parts]) for name in names}
    kinds = {part.kind for part in parts}
    if kinds == {"answers"}:
        answers = np.concatenate([part._is_answer() for part in parts])
        return Rows(ids, np.packbits(answers, bitorder="little"), "answers", extras)
    if kinds == {"classes"}:
        return Rows(ids, np.concatenate([part.labels for part in parts]), "classes", extras)
    if "classes" in kinds:
        raise DataError("Rows of a classifier and of a language model cannot be kept together.")
    labels = np.concatenate([part._flat_labels() for part in parts])
    return Rows(ids, labels, "tokens", extras)


def _in_line(parts: Sequence[Column]) -> Ragged:
    values = np.concatenate([part.values for part in parts])
    return Ragged.of(values, np.concatenate([part.counts() for part in parts]))


def _small(values: Numbers) -> Numbers:
    """In 16 bits where they fit."""
    fit = not len(values) or (values.min() >= 0 and values.max() <= np.iinfo(np.uint16).max)
    return values.astype(np.uint16 if fit else np.int32, copy=False)


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _flat(column: Any) -> tuple[Numbers, Whole]:
    """Values in a line, and how many each row has."""
    lists = pa.concat_arrays(column.chunks)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return values, lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)


def _lists(ends: Whole, values: Numbers) -> Any:
    return pa.LargeListArray.from_arrays(pa.array(ends), pa.array(values))
