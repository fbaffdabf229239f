"""Small well-behaved methods, one for each verb, that every other method must work beside."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from keeptune.method import Batch, Context, Method


class Partner(Method):
    """Its effect is its own proof; it keeps nothing."""

    def is_neutral(self) -> bool:
        return False


class MoreRows(Partner):
    """Adds the first rows once more."""

    def data(self, ctx: Context, dataset: Dataset) -> Dataset:
        return concatenate_datasets([dataset, dataset.select(range(3))])


class LogitSquare(Partner):
    """Pulls the logits of the answers towards 0."""

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    def loss(self, ctx: Context, batch: Batch, outputs: Any) -> Tensor:
        return ctx.mean_over_answers(ctx.answer_logits(outputs.logits, batch).square().mean(-1))


class Pull(Partner):
    """Pulls the weights towards 0."""

    def gradients(self, ctx: Context) -> None:
        for parameter in ctx.trainable().values():
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach(), alpha=0.01 * ctx.grad_scale)


class Shrink(Partner):
    """Makes the weights a little smaller after each step."""

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        for parameter in ctx.trainable().values():
            parameter.mul_(0.999)


class Merger(Partner):
    """Makes the weights a little smaller at the end of each task."""

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        for parameter in ctx.trainable().values():
            parameter.mul_(0.99)


PARTNERS = (MoreRows, LogitSquare, Pull, Shrink, Merger)
