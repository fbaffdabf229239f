"""What a method with a gate over frozen experts must do beyond the clauses: old tasks keep both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from keeptune.methods._adapters import FIRST, factors
from keeptune.methods.mixture import Mixture
from pencil import context
from words import WORDS, fresh, questions, rows, shares


@torch.no_grad()
def entering(model: Any, task: int) -> Tensor:
    """What a task's words enter the gate as: [rows, L, D]."""
    seen: list[Tensor] = []
    layer = model.get_base_model().model.layers[1]
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.eval()(input_ids=questions(task))
    handle.remove()
    return seen[0]


def learned(method: Mixture, tasks: int) -> tuple[Any, list[Tensor], list[dict[str, Tensor]]]:
    """A model that has learned tasks by AdamW steps on random gradients.

    Returns:
        The model; what each task's words entered the gate as when it was learned; and the expert
        that it left.
    """
    model, seen, left = fresh(), [], []
    for task in range(tasks):
        ctx = context(model, rows(task), task=f"t{task}", index=task)
        method.begin_task(ctx)
        weights = list(ctx.trainable().values())
        optimizer = torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1)
        g = torch.Generator().manual_seed(task)
        for ctx.step in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=g)
            method.gradients(ctx)
            optimizer.step()
            method.after_step(ctx)
        method.end_task(ctx)
        seen.append(entering(model, task))
        upper = {n: f for n, f in factors(model, FIRST).items() if ".layers.1." in n}
        left.append({n: f.detach().clone() for n, f in upper.items()})
    return model, seen, left


def keeps_old_experts_and_their_shares(cls: type[Mixture]) -> None:
    """After three tasks, each one's words enter the gate bit for bit as when it was learned, its
    expert is bit for bit what it was, and has the largest share of them.
    """
    model, seen, left = learned(cls(), len(WORDS))
    for task in range(len(WORDS)):
        apart = float((entering(model, task) - seen[task]).abs().max())
        assert apart == 0, f"words of task {task} enter the gate moved by {apart:.1g}"
        name = f"task_{task:03d}" if task < len(WORDS) - 1 else FIRST
        now = factors(model, name)
        moved = [n for n, factor in left[task].items() if not torch.equal(now[n], factor)]
        assert not moved, f"the expert of task {task} has moved"
        share = shares(model, task)
        assert share.argmax() == task, f"words of task {task} go to others: {share.tolist()}"
