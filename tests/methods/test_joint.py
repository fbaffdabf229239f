"""Joint training against one training on everything."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets

import pico
from keeptune.chain import Chain
from keeptune.errors import MethodError
from keeptune.method import Method
from keeptune.methods.ewc import EWC
from keeptune.methods.joint import Joint
from keeptune.methods.replay import Replay
from keeptune.tokens import collate
from keeptune.trainers import build_trainer
from pencil import Softmax, context, examples, texts


def pairs(rows: Dataset) -> list[tuple[int, int]]:
    return [(row["input_ids"][0], row["labels"]) for row in rows]


def test_every_task_is_trained_on_with_all_before_it() -> None:
    method = Joint()
    tasks = [examples((0, 0), (1, 1)), examples((2, 0)), examples((3, 1), (4, 1))]
    seen = []
    for index, rows in enumerate(tasks):
        ctx = context(Softmax([[0.0, 0.0]]), rows, task=f"t{index}", index=index)
        method.begin_task(ctx)
        seen.append(sorted(pairs(method.data(ctx, rows))))
        method.end_task(ctx)
    assert seen == [
        [(0, 0), (1, 1)],
        [(0, 0), (1, 1), (2, 0)],
        [(0, 0), (1, 1), (2, 0), (3, 1), (4, 1)],
    ]
    assert method.evidence() == {"rows_of_earlier_tasks": 3, "rows_by_task": {"t0": 2, "t1": 1}}


def test_each_task_starts_from_the_first_weights() -> None:
    model, method = Softmax([[1.0, 2.0]]), Joint()
    for index in range(3):
        ctx = context(model, examples((0, 0)), index=index)
        method.begin_task(ctx)
        assert model.weight.tolist() == [[1.0, 2.0]]
        with torch.no_grad():
            model.weight.add_(index + 1.0)
        method.end_task(ctx)
        assert model.weight.tolist() == [[2.0 + index, 3.0 + index]]


def learned(tasks: list[Dataset], methods: list[Method], first: int = 0) -> dict[str, Any]:
    model, tokenizer = pico.causal_lm(32), pico.tokenizer()
    settings = {
        "output_dir": tempfile.gettempdir(),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
    }
    trainer = build_trainer(
        "causal_lm", model, tokenizer, tasks[0], methods, settings, collate(tokenizer)
    )
    for index, rows in enumerate(tasks, start=first):
        trainer.learn(f"t{index}", rows, index=index)
    return model.state_dict()


def test_the_last_task_ends_as_one_training_on_everything() -> None:
    tasks = [texts(*[[6 + k, 7 + i, 8 + i] for i in range(3)]) for k in range(3)]
    everything = concatenate_datasets([tasks[2], tasks[0], tasks[1]])
    joint = learned(tasks, [Joint()])
    once = learned([everything], [], first=2)
    assert all(torch.equal(joint[name], once[name]) for name in once)


@pytest.mark.parametrize("other", [Replay(), EWC()])
def test_it_refuses_methods_that_need_the_stream(other: Method) -> None:
    with pytest.raises(MethodError, match="cannot run together"):
        Chain([Joint(), other])


def test_weights_that_only_some_tasks_train_start_anew_too() -> None:
    model: Any = pico.causal_lm()
    parts = [model.model.layers[i].mlp.up_proj for i in (0, 1)]
    first = [part.weight.detach().clone() for part in parts]
    method = Joint()
    for index, part in enumerate((*parts, parts[0])):
        model.requires_grad_(False)
        part.requires_grad_(True)
        ctx = context(model, texts([6, 7, 8]), task=f"t{index}", index=index)
        method.begin_task(ctx)
        assert all(torch.equal(p.weight, w) for p, w in zip(parts, first, strict=True))
        with torch.no_grad():
            part.weight.add_(1.0)
        method.end_task(ctx)
