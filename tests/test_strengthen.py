"""Strengthened runs on a tiny model: a line that weak methods let fall is kept better."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import pico
from keeptune import trainers, watchlog
from keeptune.errors import RecipeError
from keeptune.folder import RunFolder
from keeptune.progress import Silent
from keeptune.recipe import Recipe, parse_recipe
from keeptune.runs import run

WEAK = [{"l2sp": {"strength": 0.02}}]
FEW = [{"replay": {"ratio": 0.1}}]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    pico.tiny_folder(tmp_path)
    for task in range(2):
        pico.write_rows(tmp_path / f"t{task}.jsonl", pico.questions(task, 16))
    # Letters that training makes less likely, each text in another order.
    letters = "ZYXWVUTSRQPONMLKJIHGFEDCBAZYXWVUQWERTZUI"
    texts = [{"text": "".join(random.Random(i).sample(letters, 38))} for i in range(32)]
    pico.write_rows(tmp_path / "old.jsonl", texts)
    return tmp_path


def recipe(home: Path, out: str, *, tasks: int = 1, steps: int = 24, **changes: Any) -> Recipe:
    return parse_recipe(pico.by_heart(home, out, "old.jsonl", tasks=tasks, steps=steps, **changes))


def watch(on_drop: str, **more: Any) -> dict[str, Any]:
    return {"every": 2, "items": 32, "max_overhead": 1.0, "on_drop": on_drop, **more}


def efforts(folder: RunFolder, task: str = "t0") -> list[float | None]:
    return [look.effort for look in watchlog.looks(folder) if look.task == task]


def fall(folder: RunFolder, name: str, task: str) -> float:
    """How far something had fallen at a task's last look."""
    last = [k for k in watchlog.looks(folder) if k.task == task][-1]
    return -next(point.change for point in last.points if point.name == name)


def test_a_weak_pull_is_strengthened_and_the_line_kept_better(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, told = [], []

    class Ear(Silent):
        def warn(self, message: str) -> None:
            said.append(message)

    original = transformers.Trainer.log

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        told.append(dict(logs))
        original(self, logs, start_time)

    weak = run(recipe(home, "weak", methods=WEAK, watch=watch("warn", lines={"old": 0.05})))
    monkeypatch.setattr(transformers.Trainer, "log", log)
    asked = watch("strengthen", lines={"old": 0.05})
    held = run(recipe(home, "held", methods=WEAK, watch=asked), progress=Ear())
    rise = [float(f.matrix("guard")[1, 0] / f.matrix("guard")[0, 0]) for f in (weak, held)]
    assert rise[0] > 3, "nothing to hold back here"
    assert rise[1] < 1 + (rise[0] - 1) / 10
    learned = held.matrix("task")[:, 0]
    assert learned[1] < learned[0] / 5, "it learns all the same"
    trace = efforts(held)
    assert (trace[0], max(e or 0 for e in trace) > 10) == (1.0, True)
    assert efforts(weak) == [None] * 13
    assert [logs["watch_effort"] for logs in told if "watch_effort" in logs] == trace[1:]
    assert said[0].startswith("Step 10 of 24 of task 't0': 'old' (+")
    assert "fell below its line; the methods now hold 4.95 times as hard." in said[0]
    # What was done as it was set is done as before: the steps until then are the same.
    changes = [
        [look.points[1].change for look in watchlog.looks(f) if look.step <= 10]
        for f in (weak, held)
    ]
    assert changes[0] == changes[1]


def test_replay_brings_back_more_while_a_task_is_learned(home: Path) -> None:
    ends = []
    for on_drop in ("warn", "strengthen"):
        asked = watch(on_drop, guards=[], lines={"past_tasks": 5.0})
        ends.append(run(recipe(home, on_drop, tasks=2, methods=FEW, watch=asked)))
    lost = [fall(folder, "t0", "t1") for folder in ends]
    assert lost[1] < lost[0] - 0.1
    first, second = ends[1].evidence()
    assert "rows_replayed_more" not in first.methods[0].values
    assert second.methods[0].values["rows_replayed_more"] > 8
    assert second.methods[0].values["rows_replayed"] == 2


class Killed(Exception):
    """Ends a run where it is; nothing is tidied up."""


def test_a_killed_run_goes_on_to_the_same_end(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watch("strengthen", every=1, lines={"past_tasks": 0.1, "old": 0.01})
    more = {"methods": FEW + WEAK, "watch": asked, "checkpoint_minutes": 0}
    whole = run(recipe(home, "whole", tasks=2, steps=5, **more))
    step, count = trainers.Checkpoints.training_step, iter(range(100))

    def die(*args: Any, **kwargs: Any) -> Any:
        if next(count) == 8:
            raise Killed
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainers.Checkpoints, "training_step", die)
        with pytest.raises(Killed):
            run(recipe(home, "killed", tasks=2, steps=5, **more))
    again = run(recipe(home, "killed", tasks=2, steps=5, **more), resume=True)
    assert max(e or 0 for e in efforts(whole, "t1")[:4]) > 1, "it is killed while it is steered"
    assert [efforts(again, t) for t in ("t0", "t1")] == [efforts(whole, t) for t in ("t0", "t1")]
    name = "state/task-002/weights.safetensors"
    ours, theirs = (load_file(f.path / name) for f in (again, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert again.evidence()[1].methods == whole.evidence()[1].methods


def test_a_budget_beside_it_says_how_far_guards_may_fall(home: Path) -> None:
    """Against the model before any training, so that the second task has no room of its own."""
    asked = watch("strengthen", tasks="none", lines={"old": 1000.0})
    more = {"methods": WEAK, "watch": asked, "budget": {"old": 0.05}}
    held = run(recipe(home, "held", tasks=2, steps=12, **more))
    first = next(look for look in watchlog.looks(held) if look.task == "t1")
    guard, shown = held.matrix("guard")[:, 0], first.points[1]
    assert shown.allowed == pytest.approx(math.log(1.05))
    assert abs(shown.change) > 1e-3, "what the first task changed counts"
    # All texts are looked at, so that the numbers are those of the report.
    assert shown.change == pytest.approx(math.log(guard[0] / guard[1]), abs=1e-4)


def test_a_run_in_which_nothing_can_be_strengthened_is_refused(home: Path) -> None:
    methods = ["gem", {"l2sp": {"strength": 0}}]
    with pytest.raises(RecipeError) as caught:
        run(recipe(home, "refused", methods=methods, watch=watch("strengthen")))
    assert str(caught.value) == (
        "watch.on_drop: strengthen raises how hard methods hold, and none here can be raised "
        "(gem, l2sp). Add one of der, der_pp, ewc, feature_replay, hierarchical, kl_base, "
        "l2sp, lwf, mas, olora, replay, si, or choose warn, stop or rollback."
    )
    assert not (home / "refused").exists()
