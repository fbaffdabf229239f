"""Runs a small recipe in forked processes and kills them at chosen instants.

Started as a script by test_kill.py: `kill_driver.py FOLDER`; prints one JSON object. The parent
imports everything and computes nothing, so that each fork is a fresh process without the seconds
that importing takes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import torch

import pico
from keeptune import kept, runs, session, state, trainers
from keeptune.methods._anchor.hooks import ExampleHooks
from keeptune.methods.ewc import EWC
from keeptune.recipe import parse_recipe

torch.set_num_threads(1)
kept.BLOCK = 5  # rows in a file, so that there are some


def recipe(root: Path, out: Path, tasks: int) -> Any:
    for task in range(tasks):
        file = root / f"task{task}.jsonl"
        pico.write_rows(file, pico.questions(task, 12))
    names = [str(root / f"task{task}.jsonl") for task in range(tasks)]
    return parse_recipe(
        {
            "model": str(root / "tiny"),
            "adapter": "none",
            "tasks": [{"name": f"t{i}", "train": n, "eval": n} for i, n in enumerate(names)],
            "methods": [{"replay": {"ratio": 0.5}}, {"ewc": {"strength": 10}}, "lwf", "wise"],
            "trainer": {
                "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01,
                "lr_scheduler_type": "constant",
                "logging_steps": 1,
                # In the precision of GPUs, which a resumed run must be in before it trains.
                "bf16": True,
                "full_determinism": True,  # or a GPU adds in another order each time
            },
            "checkpoint_minutes": 0,
            "out": str(out),
        }
    )  # fmt: skip


def forked(work: Callable[[], Any]) -> int:
    """Run in a fork; 0 for success, -9 when it was killed."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int) -> None:
    """Kill this process at the `number`th call of a function, before the call does anything."""
    original = getattr(owner, name)
    calls = [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            die()
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def in_fisher(number: int) -> None:
    """Kill in the middle of the second task's Fisher."""
    original = EWC.end_task

    def slow(self: EWC, ctx: Any) -> None:
        if ctx.index == number:
            at_call(ExampleHooks, "backward", 2)
        original(self, ctx)

    EWC.end_task = slow  # type: ignore[method-assign]


MOMENTS: dict[str, Callable[[], None]] = {
    "in a task": lambda: at_call(trainers.Checkpoints, "training_step", 6),
    "in end_task": lambda: in_fisher(1),
    "in an evaluation": lambda: at_call(session, "score_rows", 4),
    "in the write of a state": lambda: at_call(state, "save_file", 40),
}


def results(out: Path, tasks: int) -> dict[str, Any]:
    """What must be equal: weights, method state, R with its examples, and the evidence."""
    found: dict[str, Any] = {}
    last = out / "state" / f"task-{tasks:03d}"
    found["state"] = json.loads((last / "manifest.json").read_text())
    for file in sorted((out / "rows").rglob("*.json")):
        cell = json.loads(file.read_text())
        found[str(file.relative_to(out))] = {k: v for k, v in cell.items() if k != "seconds"}
    for file in sorted((out / "evidence").glob("*.json")):
        found[file.name] = json.loads(file.read_text())
    return found


def main(root: Path) -> dict[str, Any]:
    pico.tiny_folder(root)
    whole, report = root / "whole", {}
    assert forked(lambda: runs.run(recipe(root, whole, 2))) == 0
    expected = results(whole, 2)

    def killed_run(out: Path, plant: Callable[[], None]) -> None:
        plant()
        runs.run(recipe(root, out, 2))

    def compare(name: str, plant: Callable[[], None]) -> None:
        out = root / name.replace(" ", "-")
        code = forked(lambda: killed_run(out, plant))
        assert code == -signal.SIGKILL, f"{name}: exit {code}, the moment never came"
        again = forked(lambda: runs.run(recipe(root, out, 2), resume=True))
        report[name] = "did not resume" if again else results(out, 2) == expected

    for name, plant in MOMENTS.items():
        compare(name, plant)
    # Any rename may be the last thing a process does.
    for number in (3, 11, 24, 38, 47):
        compare(
            f"at rename {number}",
            lambda number=number: at_call(Path, "replace", number),  # type: ignore[misc]
        )
    grown = root / "grown"
    assert forked(lambda: runs.run(recipe(root, grown, 1))) == 0
    (root / "two").mkdir()
    recipe(root, grown, 2)
    new = str(root / "task1.jsonl")

    def extend(plant: Callable[[], None] = lambda: None) -> None:
        plant()
        runs.learn(grown, new, name="t1", eval=new)

    in_task = forked(lambda: extend(lambda: at_call(trainers.Checkpoints, "training_step", 3)))
    assert in_task == -signal.SIGKILL
    report["learn goes on"] = forked(extend) == 0
    got = results(grown, 2)
    report["learn equals one run"] = got["state"] == expected["state"]
    report["learn fills row 0"] = (
        got["rows/000/task-001.json"] == expected["rows/000/task-001.json"]
    )
    return report


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))) + "\n")
