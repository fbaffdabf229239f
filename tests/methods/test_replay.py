"""Replay: which rows come back, how many, and never those of the present task."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from datasets import Dataset

from keeptune.methods.replay import Replay, rows_to_replay
from pencil import Softmax, context, examples, texts


def task(number: int, rows: int) -> Dataset:
    """Rows that say which task they are of: the label."""
    return examples(*[(word, number) for word in range(rows)])


def stream(method: Replay, sizes: Sequence[int], seed: int = 0) -> list[list[tuple[int, int]]]:
    """What each task is trained on, as (word, task) pairs."""
    trained = []
    for index, size in enumerate(sizes):
        rows = task(index, size)
        ctx = context(Softmax([[0.0]]), rows, task=f"t{index}", index=index, seed=seed)
        method._evidence.clear()
        method.begin_task(ctx)
        trained.append([(r["input_ids"][0], r["labels"]) for r in method.data(ctx, rows)])
        method.end_task(ctx)
    return trained


@pytest.mark.parametrize(
    ("new", "ratio", "old"), [(100, 0.2, 20), (10, 0.25, 2), (7, 1.0, 7), (3, 0.1, 0), (4, 2.5, 10)]
)
def test_rows_to_replay(new: int, ratio: float, old: int) -> None:
    assert rows_to_replay(new, ratio) == old


def test_a_task_gets_its_own_rows_and_some_of_each_earlier_task() -> None:
    method = Replay(ratio=0.5)
    first, second, third = stream(method, [40, 20, 60])
    assert first == [(word, 0) for word in range(40)]
    assert second[:20] == [(word, 1) for word in range(20)]
    assert len(second) == 30
    assert {label for _, label in second[20:]} == {0}
    assert len(third) == 90
    assert {label for _, label in third[60:]} == {0, 1}
    evidence = method.evidence()
    assert evidence["rows_replayed"] == 30
    assert sum(evidence["rows_by_task"].values()) == 30
    assert evidence["rows_new"] == 60
    assert evidence["rows_short"] == 0
    assert evidence["rows_kept"] == 60


def test_no_row_is_replayed_twice_in_one_task() -> None:
    _, second = stream(Replay(ratio=1.0), [30, 30])
    assert len(set(second)) == 60


def test_a_shortfall_is_reported_not_repeated() -> None:
    method = Replay(ratio=1.0, size=5)
    _, second = stream(method, [30, 20])
    assert len(second) == 25
    assert method.evidence()["rows_short"] == 15


def test_no_more_rows_are_kept_than_size() -> None:
    method = Replay(ratio=1.0, size=7)
    stream(method, [30, 20, 50])
    assert len(method.state().tensors["id_lengths"]) == 7


def test_the_seed_decides_which_rows_come() -> None:
    runs = [stream(Replay(ratio=0.5), [40, 40], seed=seed)[1] for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_tokens_and_labels_of_a_text_come_back_as_they_were() -> None:
    method = Replay(ratio=1.0)
    old, new = texts([7, 8, 9], [9, 8, 7]), texts([1, 2, 3, 4], [5, 6, 7, 8])
    method.end_task(context(Softmax([[0.0]]), old))
    rows = method.data(context(Softmax([[0.0]]), new, index=1), new)
    assert sorted(r["input_ids"] for r in rows.select([2, 3])) == [[7, 8, 9], [9, 8, 7]]
    assert {tuple(r["labels"]) for r in rows.select([2, 3])} == {(-100, 8, 9), (-100, 8, 7)}


def test_the_ratio_is_to_the_tasks_own_rows_whatever_else_is_mixed_in() -> None:
    method = Replay(ratio=0.5)
    method.end_task(context(Softmax([[0.0]]), task(0, 40)))
    ctx = context(Softmax([[0.0]]), task(1, 10), index=1)
    assert len(method.data(ctx, task(1, 30))) == 30 + 5


def test_columns_that_a_trainer_added_do_not_get_in_the_way() -> None:
    method = Replay(ratio=1.0)
    rows = task(0, 3).add_column("prompt", ["a", "b", "c"])
    method.end_task(context(Softmax([[0.0]]), rows))
    assert len(method.data(context(Softmax([[0.0]]), rows, index=1), rows)) == 6
