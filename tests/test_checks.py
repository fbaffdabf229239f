from __future__ import annotations

import pytest

import runs
from keeptune.checks import CHECKS, COMPARISONS, run_checks
from keeptune.folder import RunFolder
from keeptune.records import Cell, Evidence, TaskEvidence

NAN = float("nan")


def clean(path, methods=(runs.EWC, runs.REPLAY), **changes) -> RunFolder:
    return runs.fabricate(path, runs.info(methods=methods, **changes))


def found(*folders):
    return {finding.code: finding for finding in run_checks(*folders)}


def test_a_clean_run_is_flagged_for_its_one_seed_only(tmp_path):
    assert set(found(clean(tmp_path / "a"))) == {"KT006"}


def test_clean_runs_over_seeds_are_not_flagged(tmp_path):
    folders = [clean(tmp_path / str(s), seed=s) for s in (0, 1)]
    folders += [clean(tmp_path / f"plain-{s}", (), seed=s) for s in (0, 1)]
    assert run_checks(*folders) == []


def test_every_code_is_used_once():
    codes = [check.code for check in (*CHECKS, *COMPARISONS)]
    assert len(codes) == len(set(codes))
    assert all(len(code) == 5 and code.startswith("KT") for code in codes)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "is missing"),
        ({"gradient_share": None}, "is missing"),
        ({"gradient_share": 0.0}, "is 0.0"),
        ({"gradient_share": NAN}, "is nan"),
        ({"gradient_share": -1}, "is -1"),
        ({"gradient_share": "much"}, "is much"),
    ],
)
def test_kt001_a_method_that_does_nothing(tmp_path, values, said):
    run = runs.info(methods=[runs.EWC, runs.REPLAY])
    finding = found(runs.fabricate(tmp_path / "a", run, values={"ewc": values}))["KT001"]
    assert finding.severity == "error"
    assert f"did nothing on task 'Finnish names': its evidence gradient_share {said}" in (
        finding.message
    )
    assert "replay" not in finding.message
    # active_from is 1: nothing is asked of the first task
    assert "French" not in finding.message


def test_kt001_a_method_without_evidence(tmp_path):
    folder = clean(tmp_path / "a")
    others = [Evidence(name="replay", values={"rows_replayed": 3})]
    folder.write_evidence(TaskEvidence(task="Welsh names", index=2, methods=others))
    assert "ewc did nothing on task 'Welsh names'" in found(folder)["KT001"].message


def test_kt001_a_neutral_method_may_be_silent(tmp_path):
    neutral = runs.EWC.model_copy(update={"is_neutral": True})
    run = runs.info(methods=[neutral])
    folder = runs.fabricate(tmp_path / "a", run, values={"ewc": {}})
    assert "KT001" not in found(folder)


def test_kt002_nothing_learned(tmp_path):
    R = [[0.2, 0.3, 0.4], [0.7, 0.3, 0.4], [0.7, 0.31, 0.4], [0.7, 0.31, 0.8]]
    finding = found(runs.fabricate(tmp_path / "a", runs.info(), R=R))["KT002"]
    assert "taught task 'Finnish names' (+1\u00a0points, " in finding.message
    assert "French" not in finding.message


def test_kt002_a_perplexity_that_did_not_fall(tmp_path):
    run = runs.info(["a text", "b text"])
    R = [[20.0, 20.0], [10.0, 20.0], [10.0, 21.0]]
    message = found(runs.fabricate(tmp_path / "a", run, R=R))["KT002"].message
    assert "'b text' (perplexity +5\u00a0%" in message
    assert "'a text'" not in message


def test_kt003_a_leak(tmp_path):
    run = runs.info()
    run.tasks[1].leaked_rows = 7
    message = found(runs.fabricate(tmp_path / "a", run))["KT003"].message
    assert message == "7 of 120 evaluation rows of 'Finnish names' are also training rows."


def test_kt004_few_examples(tmp_path):
    run = runs.info()
    run.guards[0].eval_rows = 29
    message = found(runs.fabricate(tmp_path / "a", run))["KT004"].message
    assert "'capitals' (29)" in message
    run.guards[0].eval_rows = 30
    assert "KT004" not in found(runs.fabricate(tmp_path / "b", run))


@pytest.mark.parametrize("status", ["running", "stopped", "failed"])
def test_kt005_an_unfinished_run(tmp_path, status):
    R = runs.stream(runs.TASKS, 0.5, 0.05)[:3]
    message = found(runs.fabricate(tmp_path / "a", runs.info(status=status), R=R))["KT005"].message
    assert f"status: {status}" in message
    assert "2 of 3 tasks" in message


def test_kt006_one_recipe_of_two_has_one_seed(tmp_path):
    folders = [clean(tmp_path / str(s), seed=s) for s in (0, 1)]
    assert "KT006" not in found(*folders)
    assert found(*folders, clean(tmp_path / "plain", ()))["KT006"].severity == "note"


def test_kt007_missing_evidence(tmp_path):
    folder = clean(tmp_path / "a")
    (folder.path / "evidence" / "002.json").unlink()
    assert found(folder)["KT007"].message == ("No evidence was recorded for task 'Finnish names'.")


def test_kt008_runs_that_differ_in_more_than_their_methods(tmp_path):
    plain = clean(tmp_path / "plain", ())
    assert "KT008" not in found(plain, clean(tmp_path / "same"))
    other = clean(tmp_path / "other")
    other.info.tasks[0].eval_sha256 = "e" * 64
    other.info.model["name"] = "gpt2"
    other.save_info()
    recipe = other.path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("0.0002", "0.001"))
    finding = found(plain, other)["KT008"]
    assert finding.severity == "error"
    for words in (
        "plain and other differ",
        "trainer.learning_rate (0.0002 and 0.001)",
        "model name (SmolLM2-135M-Instruct and gpt2)",
        "evaluation data of French names",
        "and eeeeeeee…)",
    ):
        assert words in finding.message


def test_kt008_another_stream(tmp_path):
    message = found(clean(tmp_path / "a"), clean(tmp_path / "b", tasks=["x"]))["KT008"].message
    assert "tasks (['Finnish names', 'French names', 'Welsh names'] and ['x'])" in message


def test_strategies_must_share_an_order_of_the_tasks(tmp_path):
    turned = runs.TASKS[::-1]
    plain = clean(tmp_path / "a")
    ours = clean(tmp_path / "b", tasks=turned, methods=[runs.EWC])
    message = found(plain, ours)["KT008"].message
    assert message == "There are strategies that learned the tasks in no order that is the same."
    assert "KT008" not in found(plain, ours, clean(tmp_path / "c", tasks=turned))


def test_kt009_a_guard_that_cannot_fall(tmp_path):
    run = runs.info(guards=["capitals", "rocket science"])
    folder = runs.fabricate(tmp_path / "a", run, G=[[0.6, 0.02]] * 4)
    message = found(folder)["KT009"].message
    assert "'rocket science' (2 %)" in message
    assert "capitals" not in message


def test_kt010_no_guard(tmp_path):
    assert "KT010" in found(clean(tmp_path / "a", guards=[]))


def test_kt011_rows_cut(tmp_path):
    run = runs.info()
    run.tasks[0].truncated_rows, run.tasks[0].dropped_rows = 30, 5
    run.tasks[1].truncated_rows = 2
    message = found(runs.fabricate(tmp_path / "a", run))["KT011"].message
    assert message.startswith("30 rows of task 'French names' were cut because they are too long")
    assert "and 5 left out" in message
    assert "Finnish" not in message
    folder = runs.fabricate(tmp_path / "b", runs.info())
    for name, cut in (("guard-000", 60), ("guard-001", 2)):
        file = folder.path / "rows" / "000" / f"{name}.json"
        cell = Cell.model_validate_json(file.read_text())
        file.write_text(cell.model_copy(update={"truncated": cut}).model_dump_json())
    message = found(folder)["KT011"].message
    assert "60 of 120 evaluation rows of 'capitals' were cut" in message
    assert "continents" not in message


def test_the_gravest_comes_first_and_names_its_run(tmp_path):
    run = runs.info(methods=[runs.EWC], status="stopped")
    folder = runs.fabricate(tmp_path / "a", run, values={"ewc": {}})
    findings = run_checks(folder)
    assert [f.code for f in findings] == ["KT001", "KT005", "KT006"]
    assert [f.run for f in findings] == [folder.path, folder.path, None]
