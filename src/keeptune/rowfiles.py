"""Rows in Arrow files, which are mapped into memory and never changed.

A file holds one record batch, a row a line: `input_ids`, `labels` (of a language model a list of
bits, or of numbers where labels are not the ids; of a classifier a number), and one list for each
thing that is kept besides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from keeptune.rowstore import Column, Mapped, Numbers, Rows

BESIDE = "extras/"  # before the names of further columns


def write(path: Path, rows: Rows) -> None:
    """Write rows, fewer than 2^31 values of them, to a new file."""
    offsets = _offsets(rows.ids)
    columns = {"input_ids": _list(offsets, _array(rows.ids.values))}
    if rows.kind == "classes":
        columns["labels"] = pa.array(rows.labels)
    elif rows.kind == "tokens":
        columns["labels"] = _list(offsets, pa.array(rows.labels))
    else:
        bits = [None, pa.py_buffer(np.ascontiguousarray(rows.labels))]
        answers = pa.BooleanArray.from_buffers(pa.bool_(), len(rows.ids.values), bits)
        columns["labels"] = _list(offsets, answers)
    for name, part in rows.extras.items():
        columns[BESIDE + name] = _list(_offsets(part), _array(part.values))
    batch = pa.record_batch(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def read(path: Path) -> Rows:
    """The rows of a file; what is not looked at is not read."""
    with pa.memory_map(str(path)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
    parts = {}
    for name in batch.schema.names:
        if pa.types.is_list(batch[name].type):
            offsets = batch[name].offsets.to_numpy()
            parts[name] = Mapped(_numbers(batch[name].values), offsets)
    ids = parts.pop("input_ids")
    extras = {n.removeprefix(BESIDE): p for n, p in parts.items() if n.startswith(BESIDE)}
    labels = batch["labels"]
    if not pa.types.is_list(labels.type):
        return Rows(ids, labels.to_numpy(), "classes", extras)
    kind = "answers" if pa.types.is_boolean(labels.type.value_type) else "tokens"
    return Rows(ids, parts["labels"].values, kind, extras)


def _offsets(column: Column) -> Numbers:
    return np.concatenate([[0], np.cumsum(column.counts())]).astype(np.int32)


def _list(offsets: Numbers, values: Any) -> Any:
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _array(values: Numbers) -> Any:
    """As Arrow has it: further axes as lists of a fixed size."""
    array = pa.array(values.reshape(-1))
    for size in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


def _numbers(array: Any) -> Numbers:
    """What `_array` was made of, or the bytes of bits, without a copy."""
    if pa.types.is_boolean(array.type):
        return np.frombuffer(array.buffers()[1], np.uint8)[: (len(array) + 7) // 8]
    shape = [len(array)]
    while pa.types.is_fixed_size_list(array.type):
        shape.append(array.type.list_size)
        array = array.values
    return np.asarray(array.to_numpy()).reshape(shape)
