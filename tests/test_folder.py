from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import runs
from keeptune.disk import new_folder, verify, write_atomic
from keeptune.errors import FolderError
from keeptune.folder import RunFolder
from keeptune.records import Cell, Cost, Evidence, Phase, TaskEvidence


def leftovers(path):
    return [p for p in path.rglob("*") if ".tmp" in p.name]


def test_what_is_written_is_read_back(tmp_path):
    folder = runs.fabricate(tmp_path / "run", runs.info(methods=[runs.REPLAY]))
    again = RunFolder(tmp_path / "run")
    assert again.info == folder.info
    assert again.matrix("task").shape == (4, 3)
    assert again.matrix("guard").shape == (4, 6)
    assert again.cell(1, "task", 0) == folder.cell(1, "task", 0)
    assert [e.task for e in again.evidence()] == list(runs.TASKS)
    assert again.cost().stored_bytes["replay"] == 9_800_000
    assert len(again.steps()) == 150
    assert not leftovers(tmp_path)


def test_a_missing_entry_of_R_is_not_a_number(tmp_path):
    folder = runs.fabricate(tmp_path / "run")
    folder.cell_file(2, "task", 1).unlink()
    assert np.isnan(folder.matrix("task")[2, 1])
    assert np.isnan(folder.matrix("task")).sum() == 1
    assert folder.cell(2, "task", 1) is None


def test_a_new_folder_has_no_rows(tmp_path):
    folder = RunFolder.create(tmp_path / "run", runs.info(), "seed: 0\n")
    assert folder.rows_done == 0
    assert folder.matrix("task").shape == (0, 3)
    assert (folder.evidence(), folder.cost(), folder.steps()) == ([], Cost(), [])


def test_infinity_and_not_a_number_come_back(tmp_path):
    folder = RunFolder.create(tmp_path / "run", runs.info(), "")
    folder.write_cell(
        0, "task", 0, Cell(name="a", score=float("inf"), unit="perplexity", n=1, examples=[])
    )
    assert folder.cell(0, "task", 0).score == np.inf
    values = {"penalty": float("nan"), "share": float("-inf")}
    folder.write_evidence(
        TaskEvidence(task="a", index=0, methods=[Evidence(name="ewc", values=values)])
    )
    back = folder.evidence()[0].methods[0].values
    assert np.isnan(back["penalty"])
    assert back["share"] == -np.inf


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("dear diary")
    with pytest.raises(FolderError, match=r"is not empty, and holds no run to go on with"):
        RunFolder.create(tmp_path, runs.info(), "")
    with pytest.raises(FolderError, match="is a file, and a run needs a folder"):
        RunFolder.create(tmp_path / "mine.txt", runs.info(), "")
    with pytest.raises(FolderError, match=r"cannot be made, since .*mine.txt is a file"):
        RunFolder.create(tmp_path / "mine.txt" / "run", runs.info(), "")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "run.json").write_text("")
    with pytest.raises(FolderError, match=r"is not empty.*--resume.*--out"):
        RunFolder.create(tmp_path, runs.info(), "")


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    assert RunFolder.create(tmp_path / "run", runs.info(), "").info.seed == 0


def test_any_other_folder_is_not_a_run(tmp_path):
    with pytest.raises(FolderError, match=r"is not a run folder.*no run\.json"):
        RunFolder(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"seed": 0}', '{"surprise": 1}', "\xff"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FolderError, match=r"run\.json is damaged: "):
        RunFolder(tmp_path)


def test_a_damaged_entry_of_R_is_named(tmp_path):
    folder = runs.fabricate(tmp_path / "run")
    folder.cell_file(1, "guard", 2).write_text("")
    with pytest.raises(FolderError, match=r"001/guard-002\.json is damaged"):
        folder.matrix("guard")


def test_a_newer_format_is_refused(tmp_path):
    folder = runs.fabricate(tmp_path / "run", R=[], G=[])
    file = folder.path / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with pytest.raises(FolderError, match=r"format 2; this keeptune reads up to 1"):
        RunFolder(folder.path)


def test_a_changed_status_is_kept(tmp_path):
    folder = runs.fabricate(tmp_path / "run", R=[], G=[])
    folder.info.status = "stopped"
    folder.save_info()
    assert RunFolder(folder.path).info.status == "stopped"


def test_a_repeated_step_counts_once_and_a_torn_line_not_at_all(tmp_path):
    folder = RunFolder.create(tmp_path / "run", runs.info(), "")
    for step, loss in ((1, 3.0), (2, 2.0), (2, 1.5)):
        folder.log_step(task="a", step=step, loss=loss)
    folder.log_step(task="b", step=1, loss=float("nan"))
    with (folder.path / "steps.jsonl").open("a") as file:
        file.write('{"task": "b", "st')
    steps = folder.steps()
    assert [(s["task"], s["step"], s["loss"]) for s in steps[:2]] == [("a", 1, 3.0), ("a", 2, 1.5)]
    assert np.isnan(steps[2]["loss"])
    assert len(steps) == 3


def test_costs_add_up_over_a_resumed_run(tmp_path):
    folder = runs.fabricate(tmp_path / "run", R=[], G=[])
    cost = folder.cost()
    cost.phases.append(Phase(phase="train", task="a", seconds=1.5, tokens=10))
    folder.write_cost(cost)
    assert folder.cost().phases[-1].tokens == 10


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_atomic(file, b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert not leftovers(tmp_path)


def test_a_folder_appears_only_when_whole(tmp_path):
    def stopped_half_way():
        with new_folder(tmp_path / "state") as path:
            (path / "weights").write_bytes(b"1234")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_half_way()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "state") as path:
        (path / "weights").write_bytes(b"1234")
    verify(tmp_path / "state")


def test_a_new_folder_replaces_the_old_one(tmp_path):
    for content in (b"old", b"new"):
        with new_folder(tmp_path / "state") as path:
            (path / content.decode()).write_bytes(content)
    assert {p.name for p in (tmp_path / "state").iterdir()} == {"new", "manifest.json"}


def test_damage_is_found_by_hash(tmp_path):
    with new_folder(tmp_path / "state") as path:
        (path / "inner").mkdir()
        (path / "inner" / "weights").write_bytes(b"1234")
    (tmp_path / "state" / "inner" / "weights").write_bytes(b"1235")
    with pytest.raises(FolderError, match=r"inner/weights is damaged"):
        verify(tmp_path / "state")
    (tmp_path / "state" / "inner" / "weights").unlink()
    with pytest.raises(FolderError, match=r"inner/weights is missing"):
        verify(tmp_path / "state")
    (tmp_path / "state" / "manifest.json").unlink()
    with pytest.raises(FolderError, match=r"manifest\.json cannot be read"):
        verify(tmp_path / "state")


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".state.{gone.pid}.tmp").mkdir()
    alive = tmp_path / f".state.{os.getppid()}.tmp"
    alive.mkdir()
    with new_folder(tmp_path / "state") as files:
        (files / "a.json").write_text("{}")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([alive.name, "state"])
