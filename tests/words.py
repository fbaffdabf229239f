"""Tasks that have no word in common, and how a mixture shares their words out."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

import pico
from keeptune.method import ADDED
from pencil import texts

WORDS = ([6, 7, 8, 9], [20, 21, 22, 23], [12, 13, 14, 15])  # of each task


def fresh(seed: int = 1) -> Any:
    """A model whose adapter says nothing yet, as every run's does at first."""
    model = pico.adapted(pico.causal_lm(32), seed=seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(weight)
    return model


def rows(task: int) -> Dataset:
    """Sixteen rows of two of a task's words, with the same answer to all."""
    own = WORDS[task]
    return texts(*[[a, b, 30, 31] for a in own for b in own], answer_from=2)


def questions(task: int) -> Tensor:
    """What comes before the answers of its rows: [16, 2]."""
    return torch.tensor(rows(task)["input_ids"])[:, :2]


@torch.no_grad()
def shares(model: Any, task: int) -> Tensor:
    """The experts' shares in the words of a task, on average: [T]."""
    model.eval()(input_ids=questions(task))
    given: Tensor = model.get_submodule(ADDED).shares
    return given.flatten(0, 1).mean(0)
