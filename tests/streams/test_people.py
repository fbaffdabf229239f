from __future__ import annotations

import pytest

from keeptune.streams import people


def facts(task):
    return {row["prompt"]: row["completion"] for row in task.train.rows}


def test_the_later_task_contradicts_some_of_the_earlier_one():
    before, after = people.stream(people=30, moved=10)
    assert (before.name, after.name) == ("before", "after")
    old, new = facts(before), facts(after)
    assert (len(old), len(new)) == (30, 10)
    assert new.keys() < old.keys()
    assert all(old[asked] != place for asked, place in new.items())


def test_both_are_asked_what_they_trained():
    for task in people.stream():
        assert task.recall
        assert task.train.rows == task.eval.rows
        assert task.score == "greedy_match"


@pytest.mark.parametrize("seed", range(3))
def test_no_first_name_comes_twice(seed):
    before, _ = people.stream(seed=seed, people=people.MOST, moved=1)
    given = [prompt.split()[2] for prompt in facts(before)]
    assert len(set(given)) == people.MOST


def test_the_seed_decides_who_there_is():
    one, same, other = (people.stream(seed=seed)[0] for seed in (0, 0, 1))
    assert one.train.sha256 == same.train.sha256 != other.train.sha256
