"""What a strategy serves, and what is left of it in an export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

import stage
from keeptune import export
from keeptune.trainers import ClassifierTrainer
from stage import Subject


def learned(subject: Subject, *, lora: bool, apart: bool = False) -> Any:
    """A trainer that has learned all tasks; `apart`, their rows have no word in common."""
    trainer, _ = stage.build([subject.make()], lora=lora, classes=subject.classes)
    for task in range(stage.TASKS):
        own = _apart(task) if apart else stage.rows(task, subject.classes)
        trainer.learn(f"t{task}", own, index=task)
    return trainer


def _apart(task: int) -> Dataset:
    """Rows of two words that no other task has."""
    g = torch.Generator().manual_seed(task)
    size = (stage.ROWS, stage.LENGTH)
    ids = torch.randint(6 + 2 * task, 8 + 2 * task, size, generator=g).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 5 + x[5:] for x in ids]})


def new_questions(task: int) -> list[list[int]]:
    """Questions in the words of `_apart`."""
    g = torch.Generator().manual_seed(100 + task)
    return torch.randint(6 + 2 * task, 8 + 2 * task, (20, 5), generator=g).tolist()


def is_routed(trainer: Any) -> bool:
    """Whether a task is chosen for each question whose task is not known."""
    return trainer.strategy.route(stage.context(trainer, stage.TASKS - 1), [[6, 7]]) is not None


@torch.no_grad()
def logits(trainer: Any) -> Tensor:
    """What the model itself answers on the rows of all tasks."""
    return _logits(trainer.model)


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    every = [row["input_ids"] for task in range(stage.TASKS) for row in stage.rows(task)]
    return stage.asked_of(model.eval(), every).clone()


def exported(trainer: Any, folder: Path) -> tuple[Tensor, bool]:
    """The answers of what is exported of a model as it stands, loaded by the libraries alone.

    Returns:
        The logits, and whether they must be the model's bit for bit: an adapter that was merged
        moves them by rounding.
    """
    model, classes = trainer.model, isinstance(trainer, ClassifierTrainer)
    folder.mkdir()
    if not hasattr(model, "peft_config"):
        export.write_model(model, None, folder)
    elif classes or not export.sole_adapter(model):
        export.write_model(copy.deepcopy(model).merge_and_unload(), None, folder)
    else:
        stage.build_model(False, 0.0).save_pretrained(folder / "base")
        export.write_model(model, str(folder / "base"), folder)
    kind: Any = "adapter" if (folder / "adapter_config.json").exists() else "model"
    again = export.load_model(folder, kind, classes=classes, dtype=torch.float32)
    again.to(model.device)
    return _logits(again), not (kind == "model" and hasattr(model, "peft_config"))
