from __future__ import annotations

import pytest

import runs
from keeptune.comparison import compare
from keeptune.errors import FolderError


def one(path, methods=(), **changes):
    scores = {k: changes.pop(k) for k in ("R", "G", "gain", "loss") if k in changes}
    return runs.fabricate(path, runs.info(methods=methods, **changes), **scores)


def test_differences_to_plain_are_paired(tmp_path):
    plain = one(tmp_path / "plain", loss=0.2)
    ours = one(tmp_path / "ewc", [runs.EWC], loss=0.1)
    floor, protected = compare([plain, ours])
    assert (floor.label, floor.is_plain, floor.differences) == ("plain", True, {})
    assert (protected.label, protected.is_plain) == ("ewc", False)
    for key in ("average_accuracy", "backward_transfer", "guard_kept", "guard_change"):
        gap = protected.differences[key]
        here, there = (g.metric(key).estimate for g in (protected, floor))
        assert gap.value == pytest.approx(here.value - there.value)
        assert gap.is_above
    gap = protected.differences["average_accuracy"]
    alone = protected.metric("average_accuracy").estimate
    assert gap.high - gap.low < alone.high - alone.low
    assert protected.differences["guard_change_perplexity"].is_below


def test_the_same_results_differ_by_nothing(tmp_path):
    _, twin = compare([one(tmp_path / "plain"), one(tmp_path / "ewc", [runs.EWC])])
    for gap in twin.differences.values():
        assert gap.value == pytest.approx(0.0)
        assert (gap.low, gap.high) == (pytest.approx(0.0), pytest.approx(0.0))


def test_other_evaluation_data_is_not_paired(tmp_path):
    plain = one(tmp_path / "plain")
    ours = one(tmp_path / "ewc", [runs.EWC])
    for task in ours.info.tasks:
        task.eval_sha256 = "f" * 64
    ours.save_info()
    _, other = compare([plain, ours])
    assert other.differences["average_accuracy"].high > 0.03


def test_seeds_are_taken_together(tmp_path):
    folders = [
        one(tmp_path / f"{len(methods)}-{seed}", methods, seed=seed, loss=loss + 0.02 * seed)
        for methods, loss in (((), 0.2), ([runs.EWC], 0.05))
        for seed in (0, 1, 2)
    ]
    plain, ours = compare(folders)
    assert plain.seeds == ours.seeds == [0, 1, 2]
    accuracy = ours.metric("average_accuracy").estimate
    values = [s.metric("average_accuracy").estimate.value for s in ours.summaries]
    assert accuracy.value == pytest.approx(sum(values) / 3)
    assert accuracy.n == 3
    assert accuracy.low < min(values) < max(values) < accuracy.high
    gap = ours.differences["average_accuracy"]
    assert gap.n == 3
    assert gap.value == pytest.approx(
        accuracy.value - plain.metric("average_accuracy").estimate.value
    )


def test_several_seeds_against_one_plain_run(tmp_path):
    plain = one(tmp_path / "plain", loss=0.2)
    seeds = [one(tmp_path / str(s), [runs.EWC], seed=s, loss=0.05) for s in (0, 1)]
    ours = compare([plain, *seeds])[1]
    assert ours.differences["backward_transfer"].is_above


def test_other_settings_are_another_group(tmp_path):
    weak = runs.EWC.model_copy(update={"settings": {"strength": 1.0}})
    groups = compare([one(tmp_path / "a", [runs.EWC]), one(tmp_path / "b", [weak], seed=1)])
    assert [g.label for g in groups] == ["ewc (strength 300, decay 1)", "ewc (strength 1)"]
    assert groups[0].differences == {}


def test_what_differs_in_no_setting_is_told_apart_by_its_folder(tmp_path):
    folders = [one(tmp_path / "a", [runs.EWC]), one(tmp_path / "b", [runs.EWC])]
    recipe = folders[1].path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("0.0002", "0.0003"))
    assert [g.label for g in compare(folders)] == ["ewc (a)", "ewc (b)"]


def test_orders_of_the_tasks_are_taken_together(tmp_path):
    ways = [runs.TASKS, runs.TASKS[::-1]]
    folders = [
        one(tmp_path / f"{len(m)}-{seed}-{i}", m, tasks=way, seed=seed, loss=loss + 0.01 * i)
        for m, loss in (((), 0.2), ([runs.EWC], 0.05))
        for seed in (0, 1)
        for i, way in enumerate(ways)
    ]
    _, ours = compare(folders)
    assert (ours.seeds, ours.orders) == ([0, 1], ways)
    assert ours.metric("average_accuracy").estimate.n == 4
    assert ours.differences["backward_transfer"].n == 4
    assert ours.differences["backward_transfer"].is_above
    # Without one of them, the others are still paired with their own likes.
    _, fewer = compare([f for f in folders if f.path.name != "0-1-1"])
    assert fewer.differences["backward_transfer"].n == 3


def test_a_neutral_method_is_plain(tmp_path):
    neutral = runs.EWC.model_copy(update={"settings": {"strength": 0.0}, "is_neutral": True})
    assert compare([one(tmp_path / "a", [neutral])])[0].is_plain


def test_a_joint_run_gives_intransigence_to_the_others(tmp_path):
    joint = one(tmp_path / "joint", [runs.JOINT], gain=0.6, loss=0)
    plain, ceiling = compare([one(tmp_path / "plain"), joint])
    assert plain.metric("intransigence").estimate.value == pytest.approx(0.05, abs=0.01)
    assert ceiling.metric("intransigence").estimate.value is None


def test_a_folder_given_twice_is_refused(tmp_path):
    folder = one(tmp_path / "a")
    with pytest.raises(FolderError, match="is given twice"):
        compare([folder, folder])


def test_a_recipe_that_is_not_yaml_is_named(tmp_path):
    folder = one(tmp_path / "a")
    (folder.path / "recipe.yaml").write_text("a: [")
    with pytest.raises(FolderError, match=r"recipe\.yaml cannot be read"):
        compare([folder])


def test_where_and_how_fast_a_run_went_makes_no_other_group(tmp_path):
    folders = [one(tmp_path / str(seed), [runs.EWC], seed=seed) for seed in (0, 1)]
    recipe = folders[1].path / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "eval_batch_size: 4\ncheckpoint_minutes: 1\n")
    (group,) = compare(folders)
    assert group.seeds == [0, 1]
