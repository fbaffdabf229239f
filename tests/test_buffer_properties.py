"""What holds for every policy, every stream and every seed."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from keeptune.buffer import Buffer, Policy, even_shares, reservoir
from keeptune.method import State
from keeptune.rowstore import Rows, joined
from keeptune.selection import herd, spread
from pencil import examples, texts

# The same examples in every run; a slow machine is no failure.
settings.register_profile("keeptune", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("keeptune")

policies = st.sampled_from(get_args(Policy))
streams = st.lists(st.integers(1, 12), min_size=1, max_size=4)
sizes = st.integers(1, 15)
seeds = st.integers(0, 2**32 - 1)


def values(policy: Policy, first: int, count: int) -> NDArray[np.float32] | None:
    """What the policy goes by: numbers that belong to the rows."""
    shape = {"surprise": (), "herding": (3,), "diversity": (3,)}.get(policy)
    if shape is None:
        return None
    drawn = [np.random.default_rng(n).normal(size=shape) for n in range(first, first + count)]
    return np.array(drawn, np.float32)


def learn(buffer: Buffer, stream: list[int], seed: int, start: int = 0, *, text: bool) -> Buffer:
    """Show the tasks from `start` on; every row has its own number."""
    for index in range(start, len(stream)):
        first, count = sum(stream[:index]), stream[index]
        numbers = range(first, first + count)
        rows = (
            texts(*[[n, n, n] for n in numbers])
            if text
            else examples(*[(n, n % 3) for n in numbers])
        )
        random = np.random.default_rng([seed, index])
        buffer.add(rows, f"t{index}", random, values(buffer.policy, first, count))
    return buffer


def contents(buffer: Buffer, *, text: bool) -> list[int]:
    like = texts([0, 0, 0]) if text else examples((0, 0))
    rows = buffer.rows(list(range(len(buffer))), like)
    assert all(
        row["labels"] == ([-100, *row["input_ids"][1:]] if text else row["input_ids"][0] % 3)
        for row in rows
    )
    return [row["input_ids"][0] for row in rows]


@given(policies, streams, sizes, seeds, st.booleans())
def test_it_is_as_full_as_it_can_be_and_every_row_is_there_once(
    policy: Policy, stream: list[int], size: int, seed: int, text: bool
) -> None:
    buffer = learn(Buffer(size, policy), stream, seed, text=text)
    rows = contents(buffer, text=text)
    assert len(rows) == len(set(rows)) == min(size, sum(stream))
    assert set(rows) <= set(range(sum(stream)))
    task = np.repeat(np.arange(len(stream)), stream)
    assert buffer.counts() == Counter(f"t{task[row]}" for row in rows)
    assert buffer.seen == sum(stream)


@given(policies, streams, sizes, seeds, st.booleans())
def test_places_are_shared_evenly_but_by_a_reservoir(
    policy: Policy, stream: list[int], size: int, seed: int, text: bool
) -> None:
    rows = contents(learn(Buffer(size, policy), stream, seed, text=text), text=text)
    if policy == "reservoir":
        return
    total = np.arange(sum(stream))
    group = np.repeat(np.arange(len(stream)), stream) if text else total % 3
    groups = group.max() + 1
    available = np.bincount(group, minlength=groups)
    held = np.bincount(group[rows], minlength=groups)
    # Whoever has fewer places than another, by more than one, has all its rows in.
    assert all(held[g] == available[g] or held[g] >= held.max() - 1 for g in range(groups))


@given(policies, streams, sizes, seeds, st.booleans(), st.data())
def test_a_resumed_stream_keeps_and_draws_the_same(
    policy: Policy, stream: list[int], size: int, seed: int, text: bool, data: Any
) -> None:
    stop = data.draw(st.integers(0, len(stream)))
    whole = learn(Buffer(size, policy), stream, seed, text=text)
    half = learn(Buffer(size, policy), stream[:stop], seed, text=text).state()
    again = Buffer(size, policy)
    again.restore(State({n: t.clone() for n, t in half.tensors.items()}, half.values))
    learn(again, stream, seed, stop, text=text)
    assert contents(again, text=text) == contents(whole, text=text)
    draws = [b.draw(5, np.random.default_rng(seed), weights={"t0": 2}) for b in (whole, again)]
    assert draws[0] == draws[1]


@given(streams, sizes, seeds)
def test_losses_below_those_kept_are_never_kept(stream: list[int], size: int, seed: int) -> None:
    rows = contents(learn(Buffer(size, "surprise"), stream, seed, text=True), text=True)
    first = 0
    for count in stream:
        own = values("surprise", first, count)
        assert own is not None
        inside = np.isin(np.arange(first, first + count), rows)
        assert not inside.any() or inside.all() or own[inside].min() >= own[~inside].max()
        first += count


@given(streams, sizes, seeds)
def test_a_reservoir_holds_rows_that_came_in_places_that_exist(
    stream: list[int], size: int, seed: int
) -> None:
    places, seen = np.empty(0, np.int64), 0
    for index, new in enumerate(stream):
        order = reservoir(len(places), new, seen, size, np.random.default_rng([seed, index]))
        places = np.concatenate([places, seen + np.arange(new)])[order]
        seen += new
    assert len(places) == len(set(places.tolist())) == min(size, seen)


@given(st.lists(st.integers(0, 20), max_size=6), st.integers(0, 60))
def test_shares_fill_all_places_that_can_be_filled(sizes: list[int], places: int) -> None:
    shares = even_shares(np.array(sizes, np.int64), places)
    assert sum(shares) == min(places, sum(sizes))
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    unfilled = [share for share, size in zip(shares, sizes, strict=True) if share < size]
    assert not unfilled or max(shares) - min(unfilled) <= 1


@given(
    st.integers(0, 40),
    st.sampled_from(["rows", "tokens"]),
    st.booleans(),
    st.dictionaries(st.sampled_from(["t0", "t1", "t2"]), st.floats(0, 4)),
    streams,
    seeds,
)
def test_draws_keep_their_promises(
    amount: int, unit: Any, repeats: bool, weights: dict[str, float], stream: list[int], seed: int
) -> None:
    buffer = learn(Buffer(None), stream, seed, text=True)
    drawn = [
        buffer.draw(
            amount, np.random.default_rng(seed), unit=unit, weights=weights, repeats=repeats
        )
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
    able = sum(n for task, n in buffer.counts().items() if weights.get(task, 1) > 0)
    wanted = amount if unit == "rows" else -(-amount // 3)
    assert len(drawn[0]) == ((wanted if able else 0) if repeats else min(wanted, able))
    assert repeats or len(set(drawn[0])) == len(drawn[0])
    assert all(weights.get(task, 1) > 0 for task in buffer.tasks(drawn[0]))


rows_of_text = st.lists(
    st.lists(st.tuples(st.integers(0, 70_000), st.booleans()), min_size=1, max_size=9),
    min_size=1,
    max_size=150,
)


@given(rows_of_text, st.data())
def test_rows_come_out_as_they_went_in(rows: list[list[tuple[int, bool]]], data: Any) -> None:
    from datasets import Dataset

    dataset = Dataset.from_dict(
        {
            "input_ids": [[i for i, _ in row] for row in rows],
            "labels": [[i if answer else -100 for i, answer in row] for row in rows],
        }
    )
    at = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=9))
    stored = Rows.of(dataset)
    assert stored.take(np.array(at)).dataset(dataset)[:] == dataset.select(at)[:]
    both = joined([stored, stored]).take(np.array(at) + len(rows))
    assert both.dataset(dataset)[:] == dataset.select(at)[:]


features = st.integers(1, 12).flatmap(
    lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=n, max_size=n)
)


@given(features, seeds, st.data())
def test_a_selection_has_as_many_rows_as_asked_and_none_twice(
    rows: list[list[int]], seed: int, data: Any
) -> None:
    count = data.draw(st.integers(0, len(rows)))
    array = np.array(rows, np.float32)
    for chosen in (herd(array, count), spread(array, count, np.random.default_rng(seed))):
        assert len(set(chosen.tolist())) == len(chosen) == count
    assert herd(array, count).tolist() == herd(array, len(rows))[:count].tolist()
