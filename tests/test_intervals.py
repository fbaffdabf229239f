from __future__ import annotations

import numpy as np
import pytest

from keeptune.intervals import (
    DRAWS,
    binomial,
    generator,
    over_seeds,
    resample,
    with_interval,
)
from keeptune.units import mean_over_seeds


def test_the_interval_of_a_mean_is_near_the_normal_one():
    scores = generator("scores").normal(3.0, 2.0, size=(1, 400))
    found = with_interval(scores.mean(), resample(scores, np.ones_like(scores), generator(0)), 400)
    half = 1.96 * scores.std() / 20
    assert found.low == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(scores.mean() + half, abs=0.1 * half)


def test_nineteen_of_twenty_intervals_hold_the_truth():
    rng, hits = generator("coverage"), 0
    for trial in range(300):
        scores = (rng.random((1, 100)) < 0.3).astype(float)
        draws = resample(scores, np.ones_like(scores), generator("draws", trial), 400)
        found = with_interval(scores.mean(), draws, 100)
        hits += found.low <= 0.3 <= found.high
    assert 0.92 <= hits / 300 <= 0.98


def test_rows_of_a_draw_share_their_examples():
    scores = np.vstack([np.arange(50.0), np.arange(50.0) + 7])
    draws = resample(scores, np.ones_like(scores), generator(1))
    assert draws.shape == (DRAWS, 2)
    assert draws[:, 1] - draws[:, 0] == pytest.approx(7)


def test_pairing_narrows_the_interval_of_a_difference():
    rng = generator("pairs")
    first = rng.normal(size=200)
    both = np.vstack([first, first + 0.1 * rng.normal(size=200)])
    draws = resample(both, np.ones_like(both), generator(2))
    assert (draws[:, 1] - draws[:, 0]).std() < 0.2 * draws[:, 0].std()


def test_weights_count():
    scores, weights = np.array([[1.0, 3.0]]), np.array([[3.0, 1.0]])
    draws = resample(scores, weights, generator(3))
    assert {round(float(d), 6) for d in draws[:, 0]} == {1.0, 1.5, 3.0}


def test_an_example_without_weight_may_be_not_a_number():
    scores, weights = np.array([[1.0, np.nan], [1.0, 0.0]]), np.array([[1.0, 0.0], [1.0, 1.0]])
    draws = resample(scores, weights, generator(4))
    known = draws[:, 0][~np.isnan(draws[:, 0])]
    assert set(known) == {1.0}


def test_many_examples_are_drawn_in_blocks(monkeypatch):
    scores = generator("blocks").random((1, 40))
    whole = resample(scores, np.ones_like(scores), generator(5), 100)
    monkeypatch.setattr("keeptune.intervals._BLOCK", 400)
    parts = resample(scores, np.ones_like(scores), generator(5), 100)
    assert parts == pytest.approx(whole)


def test_no_examples_give_no_draws():
    assert np.isnan(resample(np.ones((2, 0)), np.ones((2, 0)), generator(0))).all()


def test_same_words_same_draws():
    assert generator("a", 1).random() == generator("a", 1).random()
    assert generator("a", 1).random() != generator("a", 2).random()


def test_shares_without_examples_get_a_binomial_interval():
    draws = binomial(np.array([0.4, np.nan]), 200, generator(6))
    found = with_interval(0.4, draws[:, 0], 200)
    half = 1.96 * (0.4 * 0.6 / 200) ** 0.5
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    assert np.isnan(draws[:, 1]).all()


def test_undefined_values_have_no_interval():
    assert with_interval(float("nan"), np.full(10, np.nan), 3).value is None
    unknown = with_interval(0.5, np.full(10, np.nan), 3)
    assert (unknown.value, unknown.low, unknown.high) == (0.5, None, None)


def test_infinite_values_stay_infinite():
    found = with_interval(-np.inf, np.full(100, -np.inf), 3)
    assert found.low == found.high == -np.inf


def test_seeds_get_students_t():
    found = over_seeds([0.5, 0.6, 0.7])
    half = 4.303 * 0.1 / 3**0.5
    assert (found.value, found.n) == (pytest.approx(0.6), 3)
    assert (found.low, found.high) == (pytest.approx(0.6 - half), pytest.approx(0.6 + half))


def test_students_t_agrees_with_the_distribution():
    # t(0.975, 1) = 12.706: two seeds say little
    assert over_seeds([0.0, 1.0]).high == pytest.approx(0.5 + 12.706 * 0.5**0.5 / 2**0.5)
    many = over_seeds(list(np.tile([0.0, 1.0], 50)))
    assert many.high - many.value == pytest.approx(2.042 * 0.5025 / 10, rel=0.001)


def test_one_seed_has_no_interval_and_none_has_no_value():
    assert over_seeds([0.4]).low is None
    assert over_seeds([None]).value is None
    assert over_seeds([0.4, None, 0.6]).n == 2


def test_seeds_that_are_equal_do_not_show_how_far_they_vary():
    found = over_seeds([0.25, 0.25, None])
    assert (found.value, found.low, found.high, found.n) == (0.25, None, None, 2)
    assert not found.is_above


def test_perplexities_over_seeds_are_averaged_in_their_logarithms():
    found = mean_over_seeds([10.0, 12.0], "perplexity")
    assert found.value == pytest.approx(120**0.5)
    assert 0 < found.low < 10 < 12 < found.high
    change = mean_over_seeds([0.02, 0.30], "relative")
    assert change.value == pytest.approx((1.02 * 1.30) ** 0.5 - 1)
    assert -1 < change.low < 0.02 < 0.30 < change.high
    assert mean_over_seeds([0.5, 0.7], "share") == over_seeds([0.5, 0.7])
    assert mean_over_seeds([float("inf"), 2.0], "perplexity").value == float("inf")


@pytest.mark.parametrize(
    ("low", "high", "above", "below"),
    [(0.1, 0.2, True, False), (-0.2, -0.1, False, True), (-0.1, 0.1, False, False),
     (0.0, 0.2, False, False), (1e-17, 0.2, False, False)],
)  # fmt: skip
def test_which_side_of_zero(low, high, above, below):
    from keeptune.intervals import Estimate

    estimate = Estimate(0.0, low, high)
    assert (estimate.is_above, estimate.is_below) == (above, below)
