from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import runs
from keeptune.metrics import summarise
from keeptune.results import load

NAN = float("nan")
R = [[0.2, 0.1, 0.3], [0.8, 0.2, 0.3], [0.9, 0.7, 0.4], [0.5, 0.6, 0.9]]


def value(summary, key):
    return summary.metric(key).estimate.value


def test_every_number_of_a_run(tmp_path):
    folder = runs.fabricate(
        tmp_path / "run", runs.info(guards=["facts"]), R=R, G=[[0.5]] * 3 + [[0.4]]
    )
    summary = summarise(folder)
    assert (summary.strategy, summary.learned, summary.planned) == ("plain", 3, 3)
    assert value(summary, "learning_gain") == pytest.approx(0.6, abs=0.005)
    assert value(summary, "average_accuracy") == pytest.approx(2 / 3, abs=0.005)
    assert value(summary, "backward_transfer") == pytest.approx(-0.2, abs=0.005)
    assert value(summary, "forgetting") == pytest.approx(0.25, abs=0.005)
    assert value(summary, "guard_change") == pytest.approx(-0.1, abs=0.005)
    assert value(summary, "guard_kept") == pytest.approx(0.8, abs=0.005)


def test_every_value_lies_in_its_interval(tmp_path):
    for metric in summarise(runs.fabricate(tmp_path / "run")).metrics:
        found = metric.estimate
        if found.value is None:
            assert metric.reason
        else:
            assert found.low <= found.value <= found.high
            assert not metric.reason


def test_tracks_follow_each_task_and_guard(tmp_path):
    folder = runs.fabricate(
        tmp_path / "run", runs.info(guards=["facts"]), R=R, G=[[0.5]] * 3 + [[0.4]]
    )
    first, _, last = summarise(folder).tasks
    assert first.before.value == pytest.approx(0.2)
    assert first.learned.value == pytest.approx(0.8)
    assert first.after.value == pytest.approx(0.5)
    assert first.gain.value == pytest.approx(0.6)
    assert first.change.value == pytest.approx(-0.3)
    assert first.kept.value == pytest.approx(5 / 8)
    assert last.change.value is None
    guard = summarise(folder).guards[0]
    assert guard.learned is None
    assert guard.change.value == pytest.approx(-0.1)
    assert guard.change.low < -0.1 < guard.change.high


def test_one_task_says_why_there_is_no_transfer(tmp_path):
    summary = summarise(runs.fabricate(tmp_path / "run", runs.info(["only"])))
    for key in ("backward_transfer", "forward_transfer", "forgetting"):
        assert value(summary, key) is None
        assert summary.metric(key).reason == "needs two tasks or more"
    assert value(summary, "learning_gain") == pytest.approx(0.55, abs=0.01)


def test_perplexities_are_averaged_apart_in_log_terms(tmp_path):
    R = [[20.0, 0.2, 30.0], [10.0, 0.2, 30.0], [12.0, 0.8, 30.0], [14.4, 0.8, 15.0]]
    tasks = ["a text", "facts", "b text"]
    G = [[10.0, 40.0]] + [[10.0, 40.0]] * 2 + [[20.0, 20.0]]
    run = runs.info(tasks, ["c text", "d text"])
    summary = summarise(runs.fabricate(tmp_path / "run", run, R=R, G=G))
    # two texts, each to half its perplexity; then the first rises by 44 %
    assert value(summary, "learning_gain_perplexity") == pytest.approx(-0.5)
    assert value(summary, "backward_transfer_perplexity") == pytest.approx(0.44)
    assert value(summary, "forgetting_perplexity") == pytest.approx(0.44)
    assert value(summary, "average_accuracy_perplexity") == pytest.approx((14.4 * 15) ** 0.5)
    # one doubles, one halves: no change on the whole
    assert value(summary, "guard_change_perplexity") == pytest.approx(0.0, abs=1e-9)
    assert value(summary, "learning_gain") == pytest.approx(0.6, abs=0.01)
    assert value(summary, "backward_transfer") == pytest.approx(0.0)
    assert summary.metric("guard_kept").reason == "no guard with a share"
    assert summary.metric("learning_gain_perplexity").estimate.high < 0
    assert summary.tasks[0].change.value == pytest.approx(0.44)
    assert summary.tasks[0].change.low > 0.3


def test_a_perplexity_too_large_for_a_number_does_not_break(tmp_path):
    folder = runs.fabricate(tmp_path / "run", runs.info(["a", "b"], ["news"]), G=[[9.0]] * 3)
    cell = folder.cell(2, "guard", 0)
    worse = [e.model_copy(update={"score": float("inf")}) for e in cell.examples]
    folder.write_cell(
        2, "guard", 0, cell.model_copy(update={"score": float("inf"), "examples": worse})
    )
    assert summarise(folder).guards[0].after.value == np.inf


def test_an_interrupted_last_row_is_left_out(tmp_path):
    folder = runs.fabricate(tmp_path / "run")
    folder.cell_file(3, "guard", 5).unlink()
    assert summarise(folder).learned == 2
    assert load(folder).rows == 3


def test_before_any_task_there_is_nothing_to_say(tmp_path):
    folder = runs.fabricate(tmp_path / "run", R=[[0.1, 0.2, 0.3]])
    summary = summarise(folder)
    assert summary.learned == 0
    assert all(m.estimate.value is None and m.reason for m in summary.metrics)
    assert summary.guards[0].before.value > 0
    assert summary.guards[0].after.value is None


def test_an_empty_folder_has_a_summary(tmp_path):
    folder = runs.fabricate(tmp_path / "run", R=[], G=[])
    assert summarise(folder).learned == 0


def test_a_task_learned_later_counts_from_its_first_row(tmp_path):
    R = [[0.2, 0.1, NAN], [0.8, 0.2, NAN], [0.8, 0.7, 0.3], [0.8, 0.7, 0.9]]
    summary = summarise(runs.fabricate(tmp_path / "run", R=R))
    assert summary.tasks[2].before.value == pytest.approx(0.3)
    assert summary.tasks[2].gain.value == pytest.approx(0.6)
    assert value(summary, "learning_gain") == pytest.approx(0.6, abs=0.01)


def test_scores_without_examples_get_wider_intervals(tmp_path):
    paired = runs.fabricate(tmp_path / "paired")
    bare = runs.fabricate(tmp_path / "bare")
    for row in range(4):
        cell = bare.cell(row, "guard", 0)
        bare.write_cell(row, "guard", 0, cell.model_copy(update={"examples": []}))
    narrow, wide = summarise(paired).guards[0].change, summarise(bare).guards[0].change
    assert wide.value == narrow.value
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_intransigence_needs_a_joint_run(tmp_path):
    run = runs.fabricate(tmp_path / "run", R=R)
    joint = runs.fabricate(tmp_path / "joint", runs.info(methods=[runs.JOINT]), R=R, loss=0)
    assert "joint" in summarise(run).metric("intransigence").reason
    other = np.array(R) + 0.1
    better = runs.fabricate(tmp_path / "better", runs.info(methods=[runs.JOINT]), R=other)
    assert value(summarise(run, joint), "intransigence") == pytest.approx(0.0)
    assert value(summarise(run, better), "intransigence") == pytest.approx(0.1, abs=0.01)
    stranger = runs.fabricate(tmp_path / "other", runs.info(["x", "y", "z"]))
    assert (
        summarise(run, stranger).metric("intransigence").reason
        == "the joint run learned other tasks"
    )


def test_the_same_folder_gives_the_same_intervals(tmp_path):
    folder = runs.fabricate(tmp_path / "run")
    assert summarise(folder) == summarise(folder)


def test_metrics_checks_and_report_import_no_torch():
    code = (
        "import sys; import keeptune.metrics, keeptune.comparison, keeptune.checks, "
        "keeptune.report; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_guard_that_asks_a_tasks_facts_anew_is_no_kept_ability(tmp_path) -> None:
    folder = runs.fabricate(tmp_path / "run")
    before = summarise(folder).metric("guard_kept")
    asked = folder.info.guards[0].model_copy(update={"transfer_of": folder.info.tasks[0].name})
    folder.info = folder.info.model_copy(update={"guards": [asked, *folder.info.guards[1:]]})
    after = summarise(folder)
    kept = after.metric("guard_kept")
    assert before is not None
    assert kept is not None
    assert kept.estimate.n == before.estimate.n - 1
    assert after.guards[0].name == asked.name
