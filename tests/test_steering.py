"""Watched and budgeted runs on a tiny model: nothing changes by looking, and a drop is acted on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import pico
from keeptune import steering, trainers, watchlog
from keeptune.checks import run_checks
from keeptune.errors import RecipeError
from keeptune.folder import RunFolder
from keeptune.lines import Probe
from keeptune.methods.ewc import EWC
from keeptune.progress import Silent
from keeptune.recipe import Recipe, parse_recipe
from keeptune.records import Example
from keeptune.runs import run

TRAINER = {
    "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
}  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Path:
    pico.tiny_folder(tmp_path)
    for task in range(2):
        pico.write_rows(tmp_path / f"t{task}.jsonl", pico.questions(task, 16))
    (tmp_path / "old.txt").write_text("The committee met on Tuesday and left.\n" * 200)
    return tmp_path


def recipe(home: Path, out: str, **changes: Any) -> Recipe:
    names = [str(home / f"t{task}.jsonl") for task in range(2)]
    values: dict[str, Any] = {
        "model": str(home / "tiny"),
        "adapter": "none",
        "tasks": [
            {"name": f"t{i}", "train": name, "eval": name, "recall": True, "score": "perplexity"}
            for i, name in enumerate(names)
        ],
        "guards": [{"name": "old", "text": str(home / "old.txt")}],
        "trainer": dict(TRAINER),
        "out": str(home / out),
    }
    return parse_recipe({**values, **changes})


def weights(folder: RunFolder, task: int = 2) -> dict[str, torch.Tensor]:
    return load_file(folder.path / "state" / f"task-{task:03d}" / "weights.safetensors")


def test_a_run_that_only_warns_has_the_weights_of_one_that_is_not_watched(home: Path) -> None:
    adapter = {"kind": "lora", "rank": 4, "dropout": 0.3}
    trainer = {**TRAINER, "max_steps": 4}
    plain = run(recipe(home, "plain", adapter=adapter, methods=["replay"], trainer=trainer))
    watch = {"every": 1, "max_overhead": 1.0}
    seen = run(
        recipe(home, "seen", adapter=adapter, methods=["replay"], trainer=trainer, watch=watch)
    )
    ours, theirs = weights(plain), weights(seen)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    looks = watchlog.looks(seen)
    assert [(k.task, k.step) for k in looks] == [(t, s) for t in ("t0", "t1") for s in range(5)]
    assert [p.name for p in looks[-1].points] == ["t1", "t0", "old"]
    assert [p.role for p in looks[-1].points] == ["learning", "task", "guard"]
    assert looks[4].points[0].change > 0
    phases = {p.phase for p in seen.cost().phases}
    assert "watch" in phases
    assert sum(look.seconds for look in looks) > 0


# -- a planted drop -------------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """From a step on the guard's perplexity is twice as high as before, until then a bit lower."""
    original = steering.Steering._score

    def planted(self: steering.Steering, probe: Probe) -> Sequence[Example]:
        if probe.kind == "task":
            return original(self, probe)
        worse = 0.7 if self.session.trainer.state.global_step >= at else -0.1
        earlier = self._before(probe)
        return [
            e.model_copy(update={"score": e.score + worse + 0.01 * (i % 3)})
            for i, e in enumerate(earlier)
        ]

    monkeypatch.setattr(steering.Steering, "_score", planted)


WATCH = {"every": 1, "max_overhead": 1.0, "lines": {"old": 0.5}}


def test_stop_ends_a_task_as_if_its_steps_were_over(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Ear(Silent):
        def warn(self, message: str) -> None:
            said.append(message)

    plant(monkeypatch, 2)
    watched = run(recipe(home, "stopped", watch={**WATCH, "on_drop": "stop"}), progress=Ear())
    looks = watchlog.looks(watched)
    assert [k.step for k in looks if k.task == "t0"] == [0, 1, 2]
    assert looks[2].action == "stop"
    assert said[0].startswith("Step 2 of 6 of task 't0': 'old' (+103")
    assert said[0].endswith("fell below its line; the task ends here.")
    assert watched.info.status == "done"
    assert watched.matrix("task").shape == (3, 2)
    found = {f.code: f.message for f in run_checks(watched)}
    assert "Task 't0' ended at step 2 of 6, because 'old' fell" in found["KT012"]
    # The same weights as two steps alone give, since the learning rate is constant.
    monkeypatch.undo()
    trainer = {**TRAINER, "max_steps": 2}
    short = run(recipe(home, "short", trainer=trainer))
    ours, theirs = weights(watched, 1), weights(short, 1)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_rollback_ends_a_task_with_the_weights_of_the_last_look_inside(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, 3)
    back = run(recipe(home, "back", watch={**WATCH, "on_drop": "rollback"}))
    acted = next(look for look in watchlog.looks(back) if look.action)
    assert (acted.step, acted.action, acted.back_to) == (3, "rollback", 2)
    monkeypatch.undo()
    short = run(recipe(home, "short", trainer={**TRAINER, "max_steps": 2}))
    ours, theirs = weights(back, 1), weights(short, 1)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Killed(Exception):
    """Ends a run where it is; nothing is tidied up."""


@pytest.mark.parametrize(
    "moment", ["before the drop", "after the drop", "between look and checkpoint"]
)
def test_a_killed_run_goes_on_to_the_same_end(
    home: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    asked = {"watch": {**WATCH, "on_drop": "rollback"}, "checkpoint_minutes": 0}
    asked["trainer"] = {**TRAINER, "max_steps": 4}
    plant(monkeypatch, 3)
    methods = ["ewc"] if moment == "after the drop" else []
    whole = run(recipe(home, "whole", methods=methods, **asked))

    def die(*args: Any, **kwargs: Any) -> None:
        raise Killed

    def later(original: Any, calls: int) -> Any:
        count = iter(range(100))
        return lambda *a, **k: die() if next(count) == calls else original(*a, **k)

    with monkeypatch.context() as patch:
        if moment == "after the drop":
            patch.setattr(EWC, "end_task", die)
        elif moment == "before the drop":
            step = trainers.Checkpoints.training_step
            patch.setattr(trainers.Checkpoints, "training_step", later(step, 2))
        else:
            save = trainers.Checkpoints._save_checkpoint
            patch.setattr(trainers.Checkpoints, "_save_checkpoint", later(save, 1))
        with pytest.raises(Killed):
            run(recipe(home, "killed", methods=methods, **asked))
    again = run(recipe(home, "killed", methods=methods, **asked), resume=True)
    ours, theirs = weights(again, 1), weights(whole, 1)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    shown = [
        [(k.task, k.step, k.action, k.back_to) for k in watchlog.looks(f) if k.task == "t0"]
        for f in (again, whole)
    ]
    assert shown[0] == shown[1]


def test_trackers_are_told_through_the_trainer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, float]] = []
    original = transformers.Trainer.log

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        told.append(dict(logs))
        original(self, logs, start_time)

    monkeypatch.setattr(transformers.Trainer, "log", log)
    run(recipe(home, "told", watch={"every": 3, "max_overhead": 1.0}))
    seen = [logs for logs in told if "watch/old" in logs]
    assert len(seen) == 4
    assert {"watch/t0", "watch_change/t0", "watch_change/old"} <= seen[-1].keys()
    # The trainer's own figures are still there at every step.
    assert sum("loss" in logs for logs in told) == 12


# -- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"watch": {"guards": ["olt"]}}, "watch.guards names 'olt', which is no guard here. Did"),
        ({"watch": {}, "methods": ["ema"]}, "watch cannot be used with the method 'ema', which"),
        (
            {"watch": {"on_drop": "rollback"}, "methods": ["si"]},
            "watch cannot be used with the method 'si', which adds up over the steps of a task",
        ),
        (
            {"budget": {"past_tasks": 1.0}, "methods": ["si"]},
            "budget cannot be used with the method 'si', which adds up over the steps of a task",
        ),
        ({"budget": {"old": 0.1}, "methods": ["wise"]}, "sets the weights anew when a task ends"),
        ({"budget": {"old": 0.1}, "methods": ["joint"]}, "does not go on from the weights before"),
    ],
)
def test_what_cannot_be_watched_is_refused_before_anything_is_written(
    home: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        run(recipe(home, "refused", **changes))
    assert words in str(caught.value)
    assert not (home / "refused").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"watch": {"every": 0}}, "watch.every must be at least 1, got 0."),
        ({"watch": {"evry": 5}}, "there is no key 'evry' in watch. Did you mean 'every'?"),
        ({"watch": {"on_drop": "halt"}}, "watch.on_drop must be 'warn', 'stop', 'rollback' or 's"),
        ({"watch": {"lines": {"old": -1}}}, "watch.lines.old must be at least 0, got -1."),
        ({"budget": {"old": "1"}}, "budget.old must be a number, got '1'."),
        ({"budget": {"old": -1}}, "budget.old must be at least 0, got -1."),
        ({"budget": {"old": 1, "blocks": 0}}, "budget.blocks must be at least 1, got 0."),
        ({"budget": {"old": 1, "blocks": 1.5}}, "budget.blocks must be a whole number, got 1.5."),
        ({"budget": {"confidence": 0.9}}, "budget says nothing that may be lost; name a guard"),
        ({"budget": {"past_tasks": -2.0}}, "budget.past_tasks must be at least 0, got -2.0."),
    ],
)
def test_bad_settings_get_a_sentence(home: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(home, "refused", **changes)
    assert words in str(caught.value)
