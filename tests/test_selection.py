"""Herding and clusters on features small enough to see."""

from __future__ import annotations

import numpy as np

from keeptune.selection import herd, spread


def turned(*degrees: float) -> np.ndarray:
    """Features of length 2 in these directions."""
    angles = np.deg2rad(degrees)
    return 2 * np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def test_herding_takes_the_row_nearest_to_the_mean_and_then_what_balances_it() -> None:
    # The mean points to 46°; after 40° the pair with 50° is nearest to it.
    assert herd(turned(0, 40, 50, 94), 2).tolist() in ([1, 2], [2, 1])


def test_herding_follows_its_definition() -> None:
    features = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    chosen: list[int] = []
    for k in range(12):
        gaps = [
            np.inf
            if n in chosen
            else np.linalg.norm(unit.mean(0) - (unit[chosen].sum(0) + unit[n]) / (k + 1))
            for n in range(30)
        ]
        chosen.append(int(np.argmin(gaps)))
    assert herd(features, 12).tolist() == chosen


def test_the_first_of_two_rows_as_good_is_taken() -> None:
    assert herd(turned(10, 30), 1).tolist() == [0]
    assert spread(turned(10, 30), 1, np.random.default_rng(0)).tolist() == [0]


def test_the_largest_cluster_comes_first() -> None:
    features = np.array([[0, 0], [9, 9], [9, 8], [8, 9], [30, 0], [31, 0]], np.float32)
    for seed in range(5):
        order = spread(features, 3, np.random.default_rng(seed))
        assert [[0, 1, 1, 1, 2, 2][row] for row in order] == [1, 2, 0]


def test_lloyd_moves_the_centres_to_the_means() -> None:
    line = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]], np.float32)
    for seed in range(5):
        assert sorted(spread(line, 2, np.random.default_rng(seed)).tolist()) == [1, 4]


def test_what_all_rows_have_in_common_does_not_count() -> None:
    line = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]], np.float32) + 20_000
    assert sorted(spread(line, 2, np.random.default_rng(0)).tolist()) == [1, 4]


def test_among_equal_rows_the_first_fill_up() -> None:
    equal = np.ones((5, 3), np.float32)
    assert sorted(spread(equal, 3, np.random.default_rng(0)).tolist()) == [0, 1, 2]
    assert herd(equal, 3).tolist() == [0, 1, 2]
