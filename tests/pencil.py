"""A model small enough for pencil and paper, and a context around any model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from keeptune.method import Batch, Context, Method
from keeptune.rowstore import Rows


class Softmax(nn.Module):
    """p(class | word) = softmax of the word's row of `weight` [words, classes]."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.weight[input_ids[:, 0]])


def examples(*pairs: tuple[int, int]) -> Dataset:
    """(word, class) pairs as tokenised rows of a classifier."""
    return Dataset.from_dict(
        {"input_ids": [[word] for word, _ in pairs], "labels": [label for _, label in pairs]}
    )


ONE_ROW = examples((0, 0))


def texts(*rows: list[int], answer_from: int = 1) -> Dataset:
    """Equally long rows of a language model, which learns them from a position on."""
    labels = [[-100] * answer_from + row[answer_from:] for row in rows]
    return Dataset.from_dict({"input_ids": list(rows), "labels": labels})


def stored(dataset: Dataset) -> Rows:
    """Rows as a buffer has them."""
    return Rows.of(dataset.with_format("arrow")[:])


def stack(rows: list[dict[str, Any]]) -> Batch:
    """Collate rows of one length."""
    return {
        key: torch.from_numpy(np.array([row[key] for row in rows], np.int64))
        for key in ("input_ids", "labels")
    }


def added(method: Method, ctx: Context, rows: Any) -> Tensor:
    """What a method that needs answers adds to the loss of one micro batch."""
    batch = ctx.batch(list(rows))
    ctx.answers = ctx.read(batch)
    assert method.loss(ctx, batch, None) is None
    total = ctx.answers.total()
    ctx.answers = None
    assert total is not None
    return total


def context(model: nn.Module, dataset: Dataset | None = None, **more: Any) -> Context:
    """A context of the first task, unless told otherwise."""
    rows = ONE_ROW if dataset is None else dataset
    return Context(**{"task": "t0", "index": 0} | more, model=model, dataset=rows, collate=stack)


def learn(model: nn.Module, method: Method, index: int) -> Context:
    """A task of a method that moves the trained weights somewhere of its own, without steps."""
    ctx = context(model, task=f"t{index}", index=index)
    method.begin_task(ctx)
    g = torch.Generator().manual_seed(index)
    with torch.no_grad():
        for weight in ctx.trainable().values():
            weight.add_(0.3 * torch.randn(weight.shape, generator=g))
    method.end_task(ctx)
    return ctx
