"""Watched and budgeted runs on a tiny model: nothing changes by looking, and a drop is acted on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pico
from keeptune import watchlog
from keeptune.folder import RunFolder
from keeptune.recipe import Recipe, parse_recipe
from keeptune.runs import run

TRAINER = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.01}


def rows(task: int, n: int = 16) -> list[dict[str, str]]:
    return [
        {"prompt": f"{task}{i}:", "completion": f" {chr(97 + (5 * i + task) % 26)}"}
        for i in range(n)
    ]


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    pico.tiny_folder(tmp_path)
    for task in range(2):
        write(tmp_path / f"t{task}.jsonl", rows(task))
    (tmp_path / "old.txt").write_text("The committee met on Tuesday and left.\n" * 200)
    return tmp_path


def recipe(home: Path, out: str, **changes: Any) -> Recipe:
    names = [str(home / f"t{task}.jsonl") for task in range(2)]
    values: dict[str, Any] = {
        "model": str(home / "tiny"),
        "adapter": "none",
        "tasks": [
            {"name": f"t{i}", "train": name, "eval": name, "recall": True}
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
