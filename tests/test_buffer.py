"""The buffer: which rows stay and which are drawn, and the same again after a reload."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from keeptune.buffer import Buffer
from keeptune.errors import DataError
from keeptune.method import State
from keeptune.places import even_shares, reservoir
from pencil import examples, texts


def numbered(first: int, count: int, *, text: bool = False) -> Dataset:
    """Rows that say which they are, of a classifier or of a language model."""
    numbers = range(first, first + count)
    return texts(*[[n, n] for n in numbers]) if text else examples(*[(n, 0) for n in numbers])


def kept(buffer: Buffer) -> list[int]:
    """Which rows are in it, by their numbers."""
    like = numbered(0, 1, text=buffer._rows.kind != "classes")
    return [row["input_ids"][0] for row in buffer.rows(list(range(len(buffer))), like)]


def test_all_rows_fit_until_it_is_full() -> None:
    buffer = Buffer(5)
    buffer.add(numbered(0, 5), "a", np.random.default_rng(0))
    assert kept(buffer) == [0, 1, 2, 3, 4]
    buffer.add(numbered(5, 20), "b", np.random.default_rng(0))
    assert len(buffer) == 5
    assert buffer.seen == 25


def unevenness(generator: Callable[[list[int]], Any]) -> float:
    """χ² of how often each of six rows, in tasks of 1, 2 and 3, is in a reservoir of two."""
    tries, counts = 3000, np.zeros(6)
    for trial in range(tries):
        places, seen = np.empty(0, np.int64), 0
        for index, new in enumerate((1, 2, 3)):
            order = reservoir(len(places), new, seen, 2, generator([trial, index]))
            places = np.concatenate([places, seen + np.arange(new)])[order]
            seen += new
        counts[places] += 1
    return evenness(counts, tries, 2)


def evenness(counts: NDArray[Any], tries: int, kept: int) -> float:
    """χ² of how often each row was among those kept."""
    share = kept / len(counts)
    # So many stay each time, which makes counts vary by 1 − share and correlate by −1 / (n − 1).
    squares = (counts - tries * share) ** 2 / (tries * share * (1 - share))
    return float(squares.sum() * (len(counts) - 1) / len(counts))


# P(χ² > 20.5) = 0.001 with 5 degrees of freedom.
LIMIT = 20.5


def test_every_row_is_kept_with_the_same_chance() -> None:
    assert unevenness(np.random.default_rng) < LIMIT


def test_deleting_leaves_all_others_their_chance() -> None:
    tries, counts = 3000, np.zeros(7)
    for trial in range(tries):
        places, seen = np.empty(0, np.int64), 0
        for index, new in enumerate((2, 2, 3)):
            order = reservoir(len(places), new, seen, 2, np.random.default_rng([trial, index]))
            places = np.concatenate([places, seen + np.arange(new)])[order]
            seen += new
            places = places[places != 1]
        counts[places] += 1
    assert counts[1] == 0
    others = np.delete(counts, 1) - tries * 2 / 7
    assert (others**2).sum() / (tries * 2 / 7 * 5 / 7) < 22.5  # P = 0.001, 6 degrees of freedom


def test_one_place_too_few_would_be_seen() -> None:
    class OffByOne:
        def __init__(self, seed: list[int]) -> None:
            self.true = np.random.default_rng(seed)

        def integers(self, high: Any) -> Any:
            return self.true.integers(np.maximum(high - 1, 1))

    assert unevenness(OffByOne) > LIMIT


def test_a_balanced_buffer_keeps_each_row_of_a_task_with_the_same_chance() -> None:
    tries, counts = 150, np.zeros(6)
    for trial in range(tries):
        buffer = Buffer(4, "balanced")
        for index in range(2):  # four of the first six rows stay, and then two of them
            random = np.random.default_rng([trial, index])
            buffer.add(numbered(6 * index, 6, text=True), f"t{index}", random)
        counts[[number for number in kept(buffer) if number < 6]] += 1
    assert evenness(counts, tries, 2) < LIMIT


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
    # Ids, a bit a token in one byte, lengths, one start, tasks, names.
    about = buffer.state().tensors["about"].nbytes
    assert buffer.nbytes() == 2 * 6 + 1 + 2 * 2 + 8 + 2 + about


def test_a_token_takes_little_more_than_two_bytes() -> None:
    buffer = Buffer(None)
    buffer.add(texts(*[list(range(64))] * 640), "a", np.random.default_rng(0))
    assert buffer.nbytes() <= 2.2 * 640 * 64


def outputs(rows: NDArray[np.int64]) -> dict[str, list[NDArray[Any]]]:
    """What a method might keep of rows: values of each token by their numbers, and of each row."""
    return {
        "logits": [np.full((row % 3, 2), row, np.float16) for row in rows],
        "feature": [np.full((1, 4), -row, np.float32) for row in rows],
    }


def test_what_is_kept_besides_stays_with_its_row(tmp_path: Path) -> None:
    buffer = Buffer(6)
    asked: list[int] = []

    def shifted(first: int) -> Callable[[NDArray[np.int64]], Any]:
        def extras(rows: NDArray[np.int64]) -> Any:
            assert (np.diff(rows) > 0).all()
            asked.extend(first + rows)
            return outputs(first + rows)

        return extras

    for first in (0, 20, 40):
        rows = numbered(first, 20, text=True)
        buffer.add(rows, "a", np.random.default_rng(first), extras=shifted(first))
    again = reloaded(buffer, tmp_path / "buffer.safetensors")
    drawn = [3, 0, 3, 5]
    numbers = np.array(kept(buffer))[drawn]
    for one in (buffer, again):
        found = one.extras(drawn)
        assert found["logits"].dtype == np.float16
        assert found["logits"][:, 0].tolist() == np.repeat(numbers, numbers % 3).tolist()
        assert found["feature"].tolist() == [[-n] * 4 for n in numbers]
    assert buffer.nbytes() == sum(t.nbytes for t in buffer.state().tensors.values())
    assert set(kept(buffer)) <= set(asked)
    assert len(asked) <= 6 + 6 + 6, "only what is kept when a task ends is looked at"


def test_what_is_kept_besides_is_asked_for_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keeptune.buffer.BLOCK", 7)
    buffer, sizes = Buffer(None), []

    def extras(rows: NDArray[np.int64]) -> Any:
        sizes.append(len(rows))
        return outputs(rows)

    buffer.add(numbered(0, 20, text=True), "a", np.random.default_rng(0), extras=extras)
    assert sizes == [7, 7, 6]
    assert kept(buffer) == list(range(20))
    assert buffer.extras([19, 2])["feature"][:, 0].tolist() == [-19, -2]


# -- policies -------------------------------------------------------------------------------------


def filled(buffer: Buffer, *sizes: int, text: bool = True, values: Any = None) -> Buffer:
    """Tasks of these sizes one after another, the rows numbered through."""
    first = 0
    for index, size in enumerate(sizes):
        own = None if values is None else np.asarray(values[first : first + size], np.float32)
        rows = numbered(first, size, text=text)
        buffer.add(rows, f"t{index}", np.random.default_rng(index), own)
        first += size
    return buffer


@pytest.mark.parametrize(
    ("sizes", "places", "shares"),
    [
        ([5, 5], 4, [2, 2]),
        ([5, 5], 5, [3, 2]),
        ([1, 9, 9], 7, [1, 3, 3]),
        ([9, 1, 9], 8, [4, 1, 3]),
        ([2, 2], 9, [2, 2]),
        ([3, 3, 3], 2, [1, 1, 0]),
        ([], 3, []),
    ],
)
def test_places_are_shared_out_evenly(sizes: list[int], places: int, shares: list[int]) -> None:
    assert even_shares(np.array(sizes, np.int64), places) == shares


def test_a_ring_keeps_the_last_rows_of_each_task() -> None:
    buffer = filled(Buffer(6, "ring"), 10, 10)
    assert kept(buffer) == [7, 8, 9, 17, 18, 19]
    assert buffer.counts() == {"t0": 3, "t1": 3}


def test_a_small_task_leaves_its_places_to_the_others() -> None:
    assert filled(Buffer(9, "balanced"), 1, 20, 20).counts() == {"t0": 1, "t1": 4, "t2": 4}


def test_a_reservoir_gives_places_by_size() -> None:
    counts = filled(Buffer(100, "reservoir"), 50, 950).counts()
    assert counts["t0"] < 15


def test_surprise_keeps_the_highest_losses_of_each_task() -> None:
    losses = [0.1, 5.0, 0.3, 4.0, 90.0, 20.0, 70.0, 80.0]
    assert kept(filled(Buffer(4, "surprise"), 4, 4, values=losses)) == [1, 3, 4, 7]


def test_a_classifier_has_places_by_class_over_all_tasks() -> None:
    buffer = Buffer(6, "balanced")
    for index in range(2):
        rows = examples(*[(10 * index + n, int(n > 7)) for n in range(10)])
        buffer.add(rows, f"t{index}", np.random.default_rng(index))
    labels = buffer.rows(list(range(6)), examples((0, 0)))["labels"]
    assert Counter(labels) == {0: 3, 1: 3}


def test_herding_keeps_the_rows_whose_mean_is_that_of_all() -> None:
    angles = np.deg2rad([0, 40, 80, 10, 70])
    features = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert kept(filled(Buffer(1, "herding"), 5, values=features)) == [1]


def test_herding_keeps_its_first_choices_when_places_get_fewer() -> None:
    features = np.random.default_rng(0).normal(size=(20, 4))
    full = kept(filled(Buffer(8, "herding"), 10, values=features[:10]))
    later = kept(filled(Buffer(8, "herding"), 10, 10, values=features))
    assert len(later) == 8
    assert {n for n in later if n < 10} < set(full)


def test_diversity_keeps_one_row_of_each_cluster() -> None:
    centres = np.array([[0, 0], [100, 0], [0, 100]])
    noise = np.random.default_rng(0).normal(size=(30, 2))
    features = np.repeat(centres, 10, 0) + noise
    rows = kept(filled(Buffer(3, "diversity"), 30, values=features))
    assert sorted(number // 10 for number in rows) == [0, 1, 2]


# -- draws ----------------------------------------------------------------------------------------


def test_rows_of_a_heavier_task_are_drawn_more_often() -> None:
    buffer = filled(Buffer(None), 100, 100)
    drawn = buffer.draw(2000, np.random.default_rng(0), weights={"t0": 3.0}, repeats=True)
    assert buffer.tasks(drawn)["t0"] == pytest.approx(1500, abs=80)
    once = buffer.draw(40, np.random.default_rng(0), weights={"t0": 3.0})
    assert len(set(once)) == 40
    assert buffer.tasks(once)["t0"] > 24


def test_a_task_of_weight_0_is_never_drawn() -> None:
    buffer = filled(Buffer(None), 5, 5)
    for repeats in (False, True):
        drawn = buffer.draw(9, np.random.default_rng(0), weights={"t0": 0.0}, repeats=repeats)
        assert buffer.tasks(drawn) == {"t1": 9 if repeats else 5}
    assert buffer.draw(9, np.random.default_rng(0), weights={"t0": 0.0, "t1": 0.0}) == []


def test_with_repeats_there_are_always_enough() -> None:
    buffer = filled(Buffer(None), 3)
    assert len(buffer.draw(50, np.random.default_rng(0), repeats=True)) == 50


def test_tokens_are_reached_by_as_few_rows_as_can_be() -> None:
    buffer = Buffer(None)
    rows = [[7] * length for length in (1, 2, 3, 4, 5, 6)]
    buffer.add(
        Dataset.from_dict({"input_ids": rows, "labels": rows}), "a", np.random.default_rng(0)
    )
    for repeats in (False, True):
        drawn = buffer.draw(9, np.random.default_rng(1), unit="tokens", repeats=repeats)
        assert buffer.tokens(drawn) >= 9 > buffer.tokens(drawn[:-1])
    assert buffer.tokens(buffer.draw(99, np.random.default_rng(1), unit="tokens")) == 21


def test_a_few_of_very_many_are_drawn_without_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keeptune.places.SHUFFLED", 20)
    buffer = filled(Buffer(None), 30)
    drawn = buffer.draw(12, np.random.default_rng(0))
    assert len(set(drawn)) == 12
    assert drawn == buffer.draw(12, np.random.default_rng(0))
    assert sorted(buffer.draw(99, np.random.default_rng(0))) == list(range(30))


def test_a_draw_of_nothing_is_nothing() -> None:
    assert filled(Buffer(None), 3).draw(0, np.random.default_rng(0), repeats=True) == []
