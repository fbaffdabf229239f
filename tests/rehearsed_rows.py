"""A method that rehearses kept rows, brought into its second task."""

from __future__ import annotations

import torch
from datasets import Dataset
from torch import Tensor, nn

from keeptune.method import Context, Method
from pencil import context, texts

ROWS = texts([6, 7, 8, 9], [9, 8, 7, 6], [1, 2, 3, 4], answer_from=2)


def moved(model: nn.Module, by: float = 0.1) -> None:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(by * torch.randn(weight.shape, generator=g, dtype=weight.dtype))


def gradients(method: Method, ctx: Context) -> Tensor:
    """What the method adds to gradients of 0."""
    for weight in ctx.model.parameters():
        weight.grad = torch.zeros_like(weight)
    method.gradients(ctx)
    return flat(ctx.model)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def learned(method: Method, model: nn.Module, rows: Dataset = ROWS, index: int = 0) -> Context:
    """A task that has ended; the context of the next one."""
    method.begin_task(context(model, rows, index=index))
    method.end_task(context(model, rows, task=f"t{index}", index=index))
    ctx = context(model, rows, task=f"t{index + 1}", index=index + 1)
    method.begin_task(ctx)
    return ctx
