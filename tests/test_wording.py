from __future__ import annotations

import pytest

import runs
from keeptune.comparison import compare
from keeptune.intervals import Estimate
from keeptune.wording import SPACE, estimate_text, headline, number, range_text, value_text


@pytest.mark.parametrize(
    ("estimate", "shown", "text"),
    [
        (Estimate(0.971, 0.94, 0.99), "share", "97 % (94–99)"),
        (Estimate(0.412, 0.37, 0.45), "points", "+41 points (+37 to +45)"),
        (Estimate(-0.05, -0.08, 0.02), "points", "−5 points (−8 to +2)"),
        (Estimate(0.02, 0.0, 0.04), "points", "+2 points (0 to +4)"),
        (Estimate(-0.001, -0.03, 0.03), "points", "0 points (−3 to +3)"),
        (Estimate(0.123, 0.121, 0.125), "relative", "+12.3 % (+12.1 to +12.5)"),
        (Estimate(14.21, 13.0, 15.0), "perplexity", "14.2 (13.0–15.0)"),
        (Estimate(1234.5, 1000.0, 1500.0), "perplexity", "1,234 (1,000–1,500)"),
        (Estimate(float("inf")), "perplexity", "∞"),
        (Estimate(0.5), "share", "50 %"),
        (Estimate(1.0, 1.0, 1.0), "share", "100 % (±0)"),
        (Estimate(None), "share", "–"),
    ],
)
def test_numbers_for_people(estimate, shown, text):
    assert estimate_text(estimate, shown).replace(SPACE, " ") == text


def test_missing_numbers():
    assert value_text(None, "share") == "–"
    assert range_text(None, "share") == ""
    assert number(float("-inf"), "points") == "−∞"


def said(folders, position=0):
    groups = compare(folders)
    plain = next((g for g in groups if g.is_plain), None)
    return " ".join(headline(groups[position], plain)).replace(SPACE, " ")


def one(path, methods=(), R=None, G=None, tasks=runs.TASKS, guards=("facts",), **changes):
    run = runs.info(tasks, guards, methods, **changes)
    return runs.fabricate(path, run, R=R, G=G)


FLAT = [[0.5]] * 4
R = [[0.2, 0.2, 0.2], [0.7, 0.2, 0.2], [0.7, 0.7, 0.2], [0.7, 0.7, 0.7]]


def test_learned_and_kept(tmp_path):
    text = said([one(tmp_path / "a", R=R, G=[[0.6]] * 3 + [[0.4]])])
    assert text.startswith("Learned 3 tasks: +50 points on average (")
    assert "Kept 67 % (" in text
    assert "of what it knew before, by 1 guard." in text


def test_plain_is_named_beside_a_method(tmp_path):
    plain = one(tmp_path / "plain", R=R, G=[[0.8]] * 3 + [[0.4]])
    ours = one(tmp_path / "ewc", [runs.EWC], R=R, G=[[0.8]] * 3 + [[0.7]])
    assert "; plain fine-tuning keeps 50 % (" in said([ours, plain])
    assert "plain fine-tuning" not in said([ours, plain], 1)
    assert "plain fine-tuning" not in said([ours])


def test_plain_that_keeps_more_is_not_hidden(tmp_path):
    plain = one(tmp_path / "plain", R=R, G=[[0.8]] * 3 + [[0.75]])
    ours = one(tmp_path / "ewc", [runs.EWC], R=R, G=[[0.8]] * 3 + [[0.4]])
    assert "; plain fine-tuning keeps more, 94 % (" in said([ours, plain])


def test_a_difference_within_the_noise_is_called_so(tmp_path):
    plain = one(tmp_path / "plain", R=R, G=[[0.8]] * 3 + [[0.5]])
    ours = one(tmp_path / "ewc", [runs.EWC], R=R, G=[[0.8]] * 3 + [[0.5]])
    assert ", which this sample cannot tell apart." in said([ours, plain])


def test_no_loss_is_claimed_only_for_this_sample(tmp_path):
    text = said([one(tmp_path / "a", R=R, G=FLAT)])
    assert "Kept 100 % (" in text
    assert "of what it knew before, by 1 guard: no loss that this sample could show." in text
    assert "Earlier tasks changed by 0 points (" in text


def test_losses_and_gains_of_earlier_tasks(tmp_path):
    worse, better = ([*R[:3], [end, 0.7, 0.7]] for end in (0.3, 0.98))
    assert "Earlier tasks lost 20 points (" in said([one(tmp_path / "a", R=worse, G=FLAT)])
    assert "Earlier tasks gained 14 points (" in said([one(tmp_path / "b", R=better, G=FLAT)])


def test_more_than_before(tmp_path):
    text = said([one(tmp_path / "a", R=R, G=[[0.5]] * 3 + [[0.8]])])
    assert "Knows more than before, by 1 guard: 160 % (" in text


def test_nothing_learned(tmp_path):
    flat, worse = [[0.5, 0.5, 0.5]] * 4, [[0.9] * 3, [0.3] * 3, [0.3] * 3, [0.3] * 3]
    text = said([one(tmp_path / "a", R=flat, G=FLAT)])
    assert text.startswith("3 tasks changed by 0 points on average (")
    assert "in training: no learning that this sample could show." in text
    assert said([one(tmp_path / "b", R=worse, G=FLAT)]).startswith(
        "Learned nothing: 3 tasks lost 60"
    )


def test_an_unfinished_run_says_how_far(tmp_path):
    assert "Learned 2 of 3 tasks" in said([one(tmp_path / "a", R=R[:3], G=FLAT[:3])])
    assert said([one(tmp_path / "b", R=R[:1], G=FLAT[:1])]) == "No task is learned yet."


def test_one_task_has_no_average_and_no_earlier_tasks(tmp_path):
    text = said([one(tmp_path / "a", tasks=["x"], R=[[0.1], [0.8]], G=FLAT[:2])])
    assert text.startswith("Learned 1 task: +70 points (")
    assert "arlier" not in text


def test_without_guards_nothing_is_claimed(tmp_path):
    text = said([one(tmp_path / "a", R=R, guards=(), G=[[]] * 4)])
    assert text.endswith("No guard was measured: what it knew before was not watched.")


def test_perplexities_have_their_own_sentences(tmp_path):
    perplexities = [[20.0, 20.0], [10.0, 20.0], [15.0, 10.0]]
    tasks, guards = ["a text", "b text"], ["c text"]
    text = said([one(tmp_path / "a", tasks=tasks, guards=guards, R=perplexities, G=[[9.0]] * 3)])
    assert "Perplexity of 2 tasks fell by 50" in text
    assert "Perplexity of earlier tasks rose by 50" in text
    assert "Perplexity of 1 guard text changed by 0 % (" in text
    assert "nothing that this sample could show." in text


def test_seeds_are_averaged(tmp_path):
    folders = [
        one(tmp_path / str(s), R=[*R[:3], [0.7 - s / 10, 0.7, 0.7]], G=FLAT, seed=s)
        for s in (0, 1, 2)
    ]
    assert "Earlier tasks changed by −5 points (−17 to +7) since" in said(folders)
