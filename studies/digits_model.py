"""Split and permuted digits in three scenarios, and the model and trainer that learn them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from keeptune.method import Batch, Method
from keeptune.seams import Seams

STREAMS = ("split", "permuted")
SCENARIOS = ("task", "domain", "class")
TASKS = 5
HIDDEN = 400

# -- data -----------------------------------------------------------------------------------------

Array = NDArray[np.int64]


@dataclass(frozen=True)
class Digits:
    """One task: rows to learn, and pixels with labels to score."""

    train: Dataset
    val: Batch
    test: Batch


def scenarios() -> list[str]:
    """The six of them, as "split/task"."""
    return [f"{stream}/{scenario}" for stream in STREAMS for scenario in SCENARIOS]


def width(name: str) -> int:
    """Classes within a task."""
    return 2 if name.startswith("split") else 10


@cache
def tasks(name: str) -> list[Digits]:
    """The stream of a scenario; the same in every run.

    Rows are 64 grey values, 0 to 16, followed by the number of the task, which only the model of
    the task-incremental scenario looks at. Half of the rows of each digit are for training, a
    quarter each for validation and test.

    Args:
        name: "split/task" and so on. Split: task k has the digits 2k and 2k + 1. Permuted: all
            digits, task k > 0 with its pixels in an order of its own.
    """
    pixels, digits = load_digits(return_X_y=True)
    pixels, digits = pixels.astype(np.int64), digits.astype(np.int64)
    part = _parts(digits)
    made = []
    for k in range(TASKS):
        order = np.random.default_rng(k).permutation(64) if k else np.arange(64)
        mine = digits // 2 == k
        if name.startswith("permuted"):
            mine, x = np.ones_like(mine), pixels[:, order]
        else:
            x = pixels
        x = np.concatenate([x, np.full_like(x[:, :1], k)], axis=1)
        y = digits % width(name) + (k * width(name) if name.endswith("class") else 0)
        rows = [(x[mine & (part == p)], y[mine & (part == p)]) for p in range(3)]
        made.append(Digits(_dataset(*rows[0]), _batch(*rows[1]), _batch(*rows[2])))
    return made


def _parts(digits: Array) -> Array:
    """0 for training, 1 for validation, 2 for test, in the same shares for each digit."""
    part = np.empty_like(digits)
    random = np.random.default_rng(0)
    for digit in range(10):
        rows = random.permutation(np.flatnonzero(digits == digit))
        part[rows] = np.searchsorted([0.5, 0.75], np.arange(len(rows)) / len(rows), "right")
    return part


def _dataset(x: Array, y: Array) -> Dataset:
    return Dataset.from_dict({"input_ids": x.tolist(), "labels": y.tolist()})


def _batch(x: Array, y: Array) -> Batch:
    return {"input_ids": torch.from_numpy(x), "labels": torch.from_numpy(y)}


def stack(rows: list[dict[str, Any]]) -> Batch:
    """Collate rows, which all have one length."""
    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}


# -- model and training ---------------------------------------------------------------------------


class MLP(nn.Module):
    """64 pixels, two hidden layers of 400, one output a class.

    Args:
        name: The scenario. Task-incremental: one head a task, and the task is known. Domain: one
            head for all. Class: one head over the classes of all tasks.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.classes = width(name)
        self.heads = name.endswith("task")
        self.first = nn.Linear(64, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, self.classes * (1 if name.endswith("domain") else TASKS))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        """Rows [B, 65] and classes [B] to loss and logits [B, classes]."""
        hidden = F.relu(self.first(input_ids[:, :64].float() / 16))
        logits = self.head(F.relu(self.second(hidden)))
        if self.heads:
            of_task = logits.view(len(logits), TASKS, self.classes)
            logits = of_task[torch.arange(len(logits)), input_ids[:, 64]]
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Learner(Seams, Trainer):  # type: ignore[misc]
    """Any trainer becomes a continual one by mixing `Seams` in."""


def epochs(name: str) -> int:
    """Passes over a task's rows: 90 to 150 optimizer steps a task."""
    return 30 if name.startswith("split") else 10


def learner(name: str, methods: list[Method], seed: int, folder: str, **changed: Any) -> Learner:
    """A fresh model in a trainer; the seed decides its weights and the order of the rows.

    Args:
        name: The scenario.
        methods: The strategy.
        seed: See above.
        folder: For what the trainer writes.
        **changed: Other training arguments than those of `digits.py`.
    """
    torch.manual_seed(seed)
    model = MLP(name)
    arguments = TrainingArguments(
        **{
            "num_train_epochs": epochs(name),
            "per_device_train_batch_size": 64,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            **changed,
        },
        output_dir=folder,
        seed=seed,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Learner(
        model=model,
        args=arguments,
        train_dataset=tasks(name)[0].train,
        data_collator=stack,
        methods=methods,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@torch.no_grad()
def accuracies(model: nn.Module, batches: list[Batch]) -> list[float]:
    """The share of right answers in each batch: one row of R."""
    model.eval()
    right = (model(b["input_ids"]).logits.argmax(-1) == b["labels"] for b in batches)
    return [round(r.float().mean().item(), 6) for r in right]
