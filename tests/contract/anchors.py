"""What a method with a quadratic penalty must do beyond the clauses, by its own state.

The clauses see that a method acts and that it goes on; these see that it acts by its formula. Each
takes a class, and has a planted fault in `test_planted_faults.py` that it must catch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from keeptune.chain import Chain
from keeptune.method import Context, Method
from keeptune.methods._anchor import Anchored
from partners import Pull
from pencil import Softmax, context, examples

ROWS = examples((0, 0), (0, 1), (0, 1), (0, 2))
APART = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)


def learn(strategy: Method | Chain, model: Softmax, ctx: Context) -> Tensor:
    """One task of six steps; returns the naive −Σ g·Δw of the task's own gradient."""
    naive = torch.zeros_like(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    strategy.begin_task(ctx)
    for ctx.step in range(6):
        optimizer.zero_grad()
        batch = ctx.batch(list(ROWS))
        F.cross_entropy(model(batch["input_ids"]).logits, batch["labels"]).backward()
        own, before = model.weight.grad.clone(), model.weight.detach().clone()
        strategy.gradients(ctx)
        optimizer.step()
        naive -= own * (model.weight.detach() - before)
        ctx.learning_rate = 0.5
        strategy.after_step(ctx)
    return naive


def _apart(cls: type[Anchored], **settings: Any) -> tuple[Anchored, Softmax, Tensor, Tensor]:
    """A method inside its second task, off its anchor; and Ω and a as its state has them."""
    model = Softmax([[0.3, -0.2, 0.9]])
    method = cls(strength=3.0, **settings)
    learn(method, model, context(model, ROWS))
    method.end_task(context(model, ROWS))
    method.begin_task(context(model, ROWS, index=1))
    with torch.no_grad():
        model.weight += APART
    # Copies, so that a state that is the weights themselves does not follow.
    kept = {name: t.clone() for name, t in method.state().tensors.items()}
    importance = kept.get("importance/weight", torch.ones_like(APART))
    return method, model, importance, kept["anchor/weight"]


def pulls_by_its_formula(cls: type[Anchored]) -> None:
    """Once the weights are off by d, the gradient is strength · Ω d."""
    method, model, importance, _ = _apart(cls)
    model.weight.grad = torch.zeros_like(model.weight)
    method.gradients(context(model, ROWS, index=1))
    want = 3.0 * importance * APART
    assert importance.any(), "nothing is of importance"
    assert torch.allclose(model.weight.grad, want), f"pulls by {model.weight.grad}, not {want}"


def steps_back_by_its_formula(cls: type[Anchored]) -> None:
    """The implicit step is (w + c a) / (1 + c) with c = learning rate · strength · Ω."""
    for rate in (0.0, 1e-3, 2.0):
        method, model, importance, anchor = _apart(cls, proximal=True)
        c = rate * 3.0 * importance
        want = (model.weight.detach() + c * anchor) / (1 + c)
        method.after_step(context(model, ROWS, index=1, learning_rate=rate))
        got = model.weight.detach()
        assert torch.allclose(got, want), f"at a rate of {rate} it steps to {got}, not {want}"


def follows_the_tasks_own_gradient(cls: type[Anchored]) -> None:
    """Its path is −Σ g·Δw of the task's own gradient and the real step, wherever it is listed."""
    for first in (True, False):
        model, method = Softmax([[0.3, -0.2, 0.9]]), cls(strength=50.0)
        chain = Chain([method, Pull()] if first else [Pull(), method])
        for index in range(2):
            ctx = context(model, ROWS, index=index)
            want = learn(chain, model, ctx)
            got = method.state().tensors.get("path/weight")
            if got is None:
                assert index, "it follows no path in the first task"
                continue
            assert torch.allclose(got, want), f"its path in task {index} is {got}, not {want}"
            chain.end_task(ctx)


def squares_each_example(cls: type[Anchored]) -> None:
    """Two examples with opposite gradients do not cancel in the importance."""
    model = Softmax([[0.0, 0.0]])
    method = cls()
    ctx = context(model, examples((0, 0), (0, 1)))
    method.begin_task(ctx)
    method.end_task(ctx)
    importance = method.state().tensors["importance/weight"]
    assert torch.allclose(importance, torch.full_like(importance, 0.25)), f"F is {importance}"
