"""Rows in few bytes come out as they went in, whatever their labels."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from keeptune.errors import DataError
from keeptune.rowstore import Rows, joined
from pencil import examples, texts


def rows(ids: list[list[int]], labels: list[list[int]]) -> Dataset:
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


ANSWERS = rows([[1, 2], [3, 4, 5]], [[-100, 2], [3, -100, 5]])
OTHER = rows([[1, 2, 3], [4]], [[2, 3, -100], [9]])  # labels that are not the ids


def test_each_kind_of_labels_has_its_own_form() -> None:
    kinds = {"answers": ANSWERS, "tokens": OTHER, "classes": examples((7, 2), (8, 0))}
    for kind, dataset in kinds.items():
        stored = Rows.of(dataset)
        assert stored.kind == kind
        assert list(stored.dataset(dataset)) == list(dataset)
        assert list(stored.take(np.array([1, 0, 1])).dataset(dataset)) == [
            dataset[1],
            dataset[0],
            dataset[1],
        ]


def test_rows_whose_labels_are_of_two_kinds_can_be_joined() -> None:
    both = joined([Rows.of(ANSWERS), Rows.of(OTHER)])
    assert list(both.dataset(OTHER)) == [*ANSWERS, *OTHER]


def test_ids_take_16_bits_where_they_fit() -> None:
    small, large = texts([1, 65_535]), texts([1, 65_536])
    assert Rows.of(small).ids.values.dtype == np.uint16
    assert Rows.of(large).ids.values.dtype == np.int32
    both = joined([Rows.of(small), Rows.of(large)])
    assert list(both.dataset(small)) == [*small, *large]


def test_types_are_those_of_the_rows_they_go_beside() -> None:
    wide = ANSWERS.cast_column("labels", OTHER.features["labels"])
    assert Rows.of(wide).dataset(ANSWERS).features == ANSWERS.features


def test_the_place_of_every_row_is_found_among_many() -> None:
    lengths = np.random.default_rng(0).integers(1, 9, 300)
    many = rows(
        [[i] * int(n) for i, n in enumerate(lengths)], [[i] * int(n) for i, n in enumerate(lengths)]
    )
    order = np.random.default_rng(1).permutation(300)
    assert Rows.of(many).take(order).dataset(many)[:] == many.select(order)[:]


def test_no_rows_are_rows_too() -> None:
    none = Rows.none()
    assert len(none.take(np.empty(0, np.int64))) == len(none) == 0
    assert list(none.dataset(ANSWERS)) == []
    assert list(joined([none, Rows.of(ANSWERS)]).dataset(ANSWERS)) == list(ANSWERS)


def test_a_row_with_more_labels_than_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="not as many labels as tokens"):
        Rows.of(rows([[1, 2]], [[1, 2, 3]]))


def test_classes_and_texts_are_not_kept_together() -> None:
    with pytest.raises(DataError, match="cannot be kept together"):
        joined([Rows.of(ANSWERS), Rows.of(examples((1, 1)))])
