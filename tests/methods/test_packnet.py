"""PackNet by hand: who owns what, what is pruned, and that nothing owned ever moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pico
from keeptune.chain import Chain
from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.methods._isolate.owned import BLOCK, hold_gradient, put_back, strayed
from keeptune.methods.ewc import EWC
from keeptune.methods.joint import Joint
from keeptune.methods.packnet import PackNet, matrices
from keeptune.methods.task_lora import TaskLoRA
from pencil import Softmax, context


def learn(ctx: Context, method: PackNet, values: Tensor, steps: int = 3) -> None:
    """A task whose optimizer sets all weights to `values` at each step, whatever is masked."""
    method.begin_task(ctx)
    ctx.steps = steps
    for step in range(steps):
        ctx.step = step
        with torch.no_grad():
            ctx.model.weight.copy_(values)  # type: ignore[operator,union-attr]
        method.after_step(ctx)
    method.end_task(ctx)


def owners(method: PackNet) -> list[int]:
    return method._owned.owner["weight"].tolist()


def test_each_task_owns_the_largest_of_what_was_free() -> None:
    model, method = Softmax([[0.0] * 4] * 2), PackNet(prune=0.5)
    learn(context(model), method, torch.tensor([[1.0, -8, 3, -5], [2, 7, -4, 6]]))
    assert owners(method) == [0, 1, 0, 1, 0, 1, 0, 1]
    assert model.weight.tolist() == [[0, -8, 0, -5], [0, 7, 0, 6]]
    assert method.evidence() == {
        "own": 4, "pruned": 4, "steps_put_back": 1, "frozen": 4, "free": 4, "free_share": 0.5,
    }  # fmt: skip
    learn(context(model, task="t1", index=1), method, torch.tensor([[9.0, 9, -2, 9], [3, 9, 1, 9]]))
    assert owners(method) == [2, 1, 0, 1, 2, 1, 0, 1]
    assert model.weight.tolist() == [[9, -8, 0, -5], [3, 7, 0, 6]]
    assert method.evidence()["free"] == 2


def test_a_task_is_served_without_the_weights_of_later_ones() -> None:
    model, method = Softmax([[0.0] * 4]), PackNet(prune=0.5)
    learn(context(model), method, torch.tensor([[1.0, 2, 3, 4]]))
    learn(ctx := context(model, task="t1", index=1), method, torch.tensor([[6.0, 5, 0, 0]]))
    every = [[6.0, 0, 3, 4]]
    for task, want in (("t0", [[0.0, 0, 3, 4]]), ("t1", every), ("t0", [[0.0, 0, 3, 4]])):
        method.serve(ctx, task)
        assert model.weight.tolist() == want
    method.serve(ctx, "t0")
    again = PackNet(prune=0.5)
    again.restore(ctx, method.state())
    again.serve(ctx, None)
    assert model.weight.tolist() == every
    again.serve(ctx, "t0")
    again.begin_task(context(model, task="t2", index=2))
    assert model.weight.tolist() == every


@pytest.mark.parametrize(("after", "step"), [(2 / 3, 3), (0.5, 2), (1.0, 5), (0.01, 0)])
def test_it_prunes_after_its_share_of_the_steps(after: float, step: int) -> None:
    model, method = Softmax([[1.0, 2, 3, 4]]), PackNet(after=after)
    method.begin_task(ctx := context(model))
    ctx.steps = 6 if after != 0.5 else 5
    pruned = []
    for now in range(ctx.steps):
        ctx.step = now
        method.after_step(ctx)
        pruned.append("pruned" in method.evidence())
    assert pruned.index(True) == step


def test_without_a_number_of_steps_it_prunes_at_the_end() -> None:
    model, method = Softmax([[1.0, 2, 3, 4]]), PackNet()
    learn(context(model), method, torch.tensor([[1.0, 2, 3, 4]]), steps=0)
    assert model.weight.tolist() == [[0, 0, 3, 4]]


def test_when_nothing_is_free_the_next_task_is_refused_before_it_trains() -> None:
    model, method = Softmax([[1.0, 2]]), PackNet(prune=0.5)
    for index in range(2):
        learn(context(model, task=f"t{index}", index=index), method, torch.tensor([[1.0, 2]]))
    with pytest.raises(MethodError, match="no free weight left for task 't2': 2 tasks own all 2"):
        method.begin_task(context(model, task="t2", index=2))


def test_other_weights_than_in_the_first_task_are_refused() -> None:
    model, method = pico.causal_lm(16), PackNet()
    method.begin_task(ctx := context(model))
    method.end_task(ctx)
    model.lm_head.requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(False)
    with pytest.raises(MethodError, match="Train the same weights in every task"):
        method.begin_task(context(model, task="t1", index=1))


def test_biases_norms_and_embeddings_are_trained_in_the_first_task_only() -> None:
    model, method = pico.causal_lm(16), PackNet()
    every = dict(model.named_parameters())
    method.begin_task(ctx := context(model))
    assert ctx.trainable().keys() == every.keys()
    method.end_task(ctx)
    method.begin_task(ctx := context(model, task="t1", index=1))
    assert ctx.trainable().keys() == matrices(ctx).keys()
    rest = every.keys() - ctx.trainable().keys()
    assert rest == {n for n in every if "norm" in n or "embed" in n}
    method.end_task(ctx)
    assert ctx.trainable().keys() == every.keys()


def test_under_lora_the_factors_are_packed() -> None:
    model, method = pico.adapted(pico.causal_lm(16)), PackNet(prune=0.75)
    method.begin_task(ctx := context(model))
    method.end_task(ctx)
    assert all(".lora_" in name for name in method._owned.owner)
    zero = {n: float((p == 0).float().mean()) for n, p in ctx.trainable().items()}
    assert set(zero.values()) == {0.75}


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_neither_decay_nor_momentum_moves_what_is_owned(
    optimizer: Any, weight_decay: float
) -> None:
    model, method = nn.Linear(40, 30, bias=False), PackNet()
    more = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    g, owned = torch.Generator().manual_seed(0), []
    for index in range(3):
        method.begin_task(ctx := context(model, task=f"t{index}", index=index))
        steps = optimizer(model.parameters(), lr=0.1, weight_decay=weight_decay, **more)
        ctx.steps = 9
        held = method._owned.kept["weight"].clone() if index else torch.zeros(1200)
        for ctx.step in range(9):
            steps.zero_grad()
            (model(torch.randn(8, 40, generator=g)) - 1).square().mean().backward()
            method.gradients(ctx)
            steps.step()
            method.after_step(ctx)
            mask = method._owned.moves["weight"] == 0
            assert torch.equal(model.weight.detach().view(-1)[mask], held[mask])
        method.end_task(ctx)
        owned.append(method.evidence()["own"])
    assert owned == [600, 300, 150]


def test_it_is_refused_beside_what_makes_no_sense_with_it() -> None:
    for other in (EWC(), Joint(), TaskLoRA()):
        with pytest.raises(MethodError, match="cannot run together"):
            Chain([PackNet(), other])


# -- masks ----------------------------------------------------------------------------------------


def test_masks_are_exact_over_several_blocks() -> None:
    g = torch.Generator().manual_seed(0)
    n = 2 * BLOCK + 5
    weight = nn.Parameter(torch.randn(n, generator=g))
    moves = (torch.rand(n, generator=g) < 0.5).to(torch.uint8)
    kept = torch.randn(n, generator=g) * (1 - moves)
    weight.grad = torch.randn(n, generator=g)
    want = weight.grad.where(moves == 1, 0)
    hold_gradient(weight, moves)
    assert torch.equal(weight.grad, want)
    before = weight.detach().clone()
    with torch.no_grad():
        put_back(weight, moves, kept)
        assert torch.equal(weight, before.where(moves == 1, kept))
        put_back(weight, moves, None)
    assert torch.equal(weight, before.where(moves == 1, 0))


def test_a_gradient_laid_out_otherwise_is_masked_too() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    weight.grad = torch.arange(6.0).view(3, 2).T
    hold_gradient(weight, torch.tensor([1, 0, 0, 0, 1, 1], dtype=torch.uint8))
    assert weight.grad.tolist() == [[0, 0, 0], [0, 3, 5]]
    weight.grad = None
    hold_gradient(weight, torch.ones(6, dtype=torch.uint8))
    assert weight.grad is None


def test_what_strays_is_seen() -> None:
    weight, moves = torch.tensor([1.0, 2.0]), torch.tensor([1, 0], dtype=torch.uint8)
    assert not strayed(weight, moves, torch.tensor([0.0, 2.0]))
    assert strayed(weight, moves, torch.tensor([0.0, 2.1]))
    assert strayed(weight, moves, None)
    assert strayed(torch.tensor([1.0, float("nan")]), moves, torch.tensor([0.0, 2.0]))
