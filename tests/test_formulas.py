from __future__ import annotations

import numpy as np
import pytest

from keeptune import formulas

# Rows: before, after task 1, 2, 3. Columns: the tasks.
R = np.array(
    [
        [0.2, 0.1, 0.3],
        [0.8, 0.2, 0.3],
        [0.9, 0.7, 0.4],
        [0.5, 0.6, 0.9],
    ]
)
NAN = np.nan


def test_the_scores_a_task_goes_through():
    assert formulas.learned(R).tolist() == [0.8, 0.7, 0.9]
    assert formulas.before(R).tolist() == [0.2, 0.1, 0.3]


def test_average_accuracy_is_the_mean_of_the_last_row():
    assert formulas.average_accuracy(R) == pytest.approx((0.5 + 0.6 + 0.9) / 3)


def test_average_incremental_accuracy_averages_over_the_stream():
    rows = [0.8, (0.9 + 0.7) / 2, (0.5 + 0.6 + 0.9) / 3]
    assert formulas.average_incremental_accuracy(R) == pytest.approx(sum(rows) / 3)


def test_learning_accuracy_is_the_mean_of_the_diagonal():
    assert formulas.learning_accuracy(R) == pytest.approx((0.8 + 0.7 + 0.9) / 3)


def test_learning_gain_is_the_diagonal_minus_row_0():
    assert formulas.learning_gain(R) == pytest.approx((0.6 + 0.6 + 0.6) / 3)


def test_backward_transfer_leaves_the_last_task_out():
    assert formulas.backward_transfer(R) == pytest.approx((-0.3 + -0.1) / 2)


def test_forward_transfer_is_measured_against_row_0():
    assert formulas.forward_transfer(R) == pytest.approx(((0.2 - 0.1) + (0.4 - 0.3)) / 2)


def test_forgetting_is_the_loss_from_the_best_and_not_minus_bwt():
    assert formulas.forgetting(R) == pytest.approx(((0.9 - 0.5) + (0.7 - 0.6)) / 2)
    assert formulas.forgetting(R) > -formulas.backward_transfer(R)


def test_forgetting_is_negative_when_the_last_row_is_the_best():
    rising = np.array([[0.1, 0.1], [0.4, 0.1], [0.6, 0.5]])
    assert formulas.forgetting(rising) == pytest.approx(0.4 - 0.6)


def test_the_last_row_is_not_among_the_best():
    only = np.array([[0.1, 0.1, 0.1], [0.4, 0.1, 0.1], [0.4, 0.5, 0.1], [0.9, 0.5, 0.6]])
    assert formulas.forgetting(only) == pytest.approx(((0.4 - 0.9) + 0.0) / 2)


def test_intransigence_compares_the_diagonals():
    joint = R + np.array([0.1, 0.2, 0.0])
    assert formulas.intransigence(R, joint) == pytest.approx(0.1)


def test_guard_change_and_share_kept():
    G = np.array([[0.5, 0.1], [0.9, 0.9], [0.4, 0.08]])
    assert formulas.guard_change(G) == pytest.approx((-0.1 + -0.02) / 2)
    assert formulas.share_kept(G) == pytest.approx(0.48 / 0.6)


def test_share_kept_of_nothing_is_not_a_number():
    assert np.isnan(formulas.share_kept(np.zeros((2, 3))))


def test_one_task_has_no_transfer_and_no_forgetting():
    single = np.array([[0.2], [0.7]])
    assert formulas.learning_gain(single) == pytest.approx(0.5)
    for formula in (formulas.backward_transfer, formulas.forward_transfer, formulas.forgetting):
        assert np.isnan(formula(single))


def test_a_task_added_later_has_no_early_rows():
    added = R.copy()
    added[:2, 2] = NAN
    assert formulas.before(added).tolist() == [0.2, 0.1, 0.4]
    assert formulas.learning_gain(added) == pytest.approx((0.6 + 0.6 + 0.5) / 3)
    assert formulas.forward_transfer(added) == pytest.approx(0.2 - 0.1)
    assert formulas.backward_transfer(added) == formulas.backward_transfer(R)
    assert formulas.forgetting(added) == formulas.forgetting(R)


def test_a_masked_column_is_left_out_and_keeps_its_place():
    masked = R.copy()
    masked[:, 1] = NAN
    assert formulas.average_accuracy(masked) == pytest.approx((0.5 + 0.9) / 2)
    assert formulas.backward_transfer(masked) == pytest.approx(-0.3)
    assert formulas.forgetting(masked) == pytest.approx(0.4)
    rows = [0.8, 0.9, (0.5 + 0.9) / 2]
    assert formulas.average_incremental_accuracy(masked) == pytest.approx(sum(rows) / 3)


def test_draws_in_front_give_one_value_each():
    stack = np.stack([R, R - 0.1])
    for formula in (
        formulas.average_accuracy,
        formulas.average_incremental_accuracy,
        formulas.learning_accuracy,
        formulas.learning_gain,
        formulas.backward_transfer,
        formulas.forward_transfer,
        formulas.forgetting,
        formulas.guard_change,
        formulas.share_kept,
    ):
        assert formula(stack).tolist() == pytest.approx(
            [float(formula(R)), float(formula(R - 0.1))]
        )
