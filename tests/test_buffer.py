"""The reservoir: every row with the same chance, and the same again after a reload."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from safetensors.torch import load_file, save_file

from keeptune.buffer import Buffer
from keeptune.errors import DataError
from keeptune.method import State
from pencil import examples, texts


def numbered(first: int, count: int) -> Dataset:
    """Rows that say which they are."""
    return examples(*[(number, 0) for number in range(first, first + count)])


def kept(buffer: Buffer) -> list[int]:
    """Which rows are in it, by their numbers."""
    rows = buffer.rows(list(range(len(buffer))), numbered(0, 1))
    return [row["input_ids"][0] for row in rows]


def test_all_rows_fit_until_it_is_full() -> None:
    buffer = Buffer(5)
    buffer.add(numbered(0, 5), "a", np.random.default_rng(0))
    assert kept(buffer) == [0, 1, 2, 3, 4]
    buffer.add(numbered(5, 20), "b", np.random.default_rng(0))
    assert len(buffer) == 5
    assert buffer.seen == 25


class Listed(list[dict[str, Any]]):
    """As much of a Dataset as the reservoir needs, and a hundred times as fast."""

    column_names = ("input_ids", "labels")

    def select_columns(self, names: list[str]) -> Listed:
        return self


def unevenness(generator: Callable[[list[int]], Any]) -> float:
    """χ² of how often each of six rows, in tasks of 1, 2 and 3, is in a reservoir of two."""
    tasks, tries, counts = ([0], [1, 2], [3, 4, 5]), 3000, np.zeros(6)
    for trial in range(tries):
        buffer = Buffer(2)
        for index, task in enumerate(tasks):
            rows: Any = Listed({"input_ids": [number], "labels": 0} for number in task)
            buffer.add(rows, f"t{index}", generator([trial, index]))
        counts[[int(ids[0]) for ids in buffer._ids]] += 1
    expected = tries * 2 / 6
    # Two of six stay each time, which makes counts vary by 1 − 2/6 and correlate by −1/5.
    return float(((counts - expected) ** 2 / (expected * (1 - 2 / 6)) * 5 / 6).sum())


# P(χ² > 20.5) = 0.001 with 5 degrees of freedom.
LIMIT = 20.5


def test_every_row_is_kept_with_the_same_chance() -> None:
    assert unevenness(np.random.default_rng) < LIMIT


def test_one_place_too_few_would_be_seen() -> None:
    class OffByOne:
        def __init__(self, seed: list[int]) -> None:
            self.true = np.random.default_rng(seed)

        def integers(self, high: int) -> int:
            return int(self.true.integers(high - 1))

    assert unevenness(OffByOne) > LIMIT


def test_the_same_numbers_keep_the_same_rows() -> None:
    buffers = []
    for seed in (0, 0, 1):
        buffer = Buffer(5)
        buffer.add(numbered(0, 50), "a", np.random.default_rng(seed))
        buffers.append(kept(buffer))
    assert buffers[0] == buffers[1] != buffers[2]


def test_without_a_size_every_row_is_kept() -> None:
    buffer = Buffer(None)
    buffer.add(numbered(0, 30), "a", np.random.default_rng(0))
    assert kept(buffer) == list(range(30))


def test_draws_do_not_repeat_and_are_deterministic() -> None:
    buffer = Buffer(None)
    buffer.add(numbered(0, 30), "a", np.random.default_rng(0))
    drawn = buffer.draw(10, np.random.default_rng(3))
    assert drawn == buffer.draw(10, np.random.default_rng(3))
    assert len(set(drawn)) == 10
    assert drawn != buffer.draw(10, np.random.default_rng(4))


def test_a_draw_of_more_than_there_are_gives_all_once() -> None:
    buffer = Buffer(None)
    buffer.add(numbered(0, 4), "a", np.random.default_rng(0))
    assert sorted(buffer.draw(9, np.random.default_rng(0))) == [0, 1, 2, 3]
    assert Buffer(3).draw(5, np.random.default_rng(0)) == []


def test_it_counts_by_task() -> None:
    buffer = Buffer(None)
    buffer.add(numbered(0, 3), "a", np.random.default_rng(0))
    buffer.add(numbered(3, 2), "b", np.random.default_rng(0))
    assert buffer.counts() == {"a": 3, "b": 2}
    assert buffer.tasks([0, 3, 4]) == {"a": 1, "b": 2}


def test_rows_of_unlike_lengths_come_back_as_they_were() -> None:
    rows = Dataset.from_dict(
        {"input_ids": [[7], [8, 9, 10], [11, 12]], "labels": [[7], [-100, 9, 10], [-100, 12]]}
    )
    buffer = Buffer(None)
    buffer.add(rows, "a", np.random.default_rng(0))
    assert list(buffer.rows([2, 0, 1], rows)) == [rows[2], rows[0], rows[1]]


def test_labels_of_a_classifier_come_back_as_numbers() -> None:
    rows = examples((5, 1), (6, 0))
    buffer = Buffer(None)
    buffer.add(rows, "a", np.random.default_rng(0))
    assert list(buffer.rows([0, 1], rows)) == list(rows)
    assert buffer.rows([0, 1], rows).features == rows.features


def test_rows_beside_a_task_have_its_types_and_two_columns() -> None:
    task = texts([1, 2, 3]).add_column("prompt", ["x"])
    buffer = Buffer(None)
    buffer.add(task, "a", np.random.default_rng(0))
    both = buffer.beside(task, [0])
    assert both.column_names == ["input_ids", "labels"]
    assert both[0] == both[1] == {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}


def test_packed_rows_are_refused() -> None:
    packed = texts([1, 2, 3]).add_column("seq_lengths", [[1, 2]])
    with pytest.raises(DataError, match=r"task 'a' are packed.*Leave `packing` out"):
        Buffer(3).add(packed, "a", np.random.default_rng(0))


def reloaded(buffer: Buffer, path: Path) -> Buffer:
    state = buffer.state()
    save_file(state.tensors, path)
    again = Buffer(buffer.size)
    again.restore(State(load_file(path), state.values))
    return again


def test_a_reloaded_buffer_goes_on_as_the_first_would(tmp_path: Path) -> None:
    first = Buffer(6)
    first.add(numbered(0, 20), "a", np.random.default_rng(0))
    again = reloaded(first, tmp_path / "buffer.safetensors")
    for buffer in (first, again):
        buffer.add(numbered(20, 20), "b", np.random.default_rng(1))
    assert kept(first) == kept(again)
    assert first.counts() == again.counts()
    assert first.seen == again.seen == 40


def test_an_empty_buffer_is_reloaded_empty(tmp_path: Path) -> None:
    again = reloaded(Buffer(4), tmp_path / "buffer.safetensors")
    assert len(again) == 0
    again.add(numbered(0, 2), "a", np.random.default_rng(0))
    assert kept(again) == [0, 1]


def test_its_bytes_are_those_of_its_state() -> None:
    buffer = Buffer(None)
    buffer.add(texts([1, 2, 3], [4, 5, 6]), "a", np.random.default_rng(0))
    assert buffer.nbytes() == sum(t.nbytes for t in buffer.state().tensors.values())
    assert buffer.nbytes() == 8 * 6 + 8 * 2
