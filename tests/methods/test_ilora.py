"""The fast learner's terms by hand and against autograd, and what the slow one takes part in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pico
from keeptune.method import Context
from keeptune.methods.ilora import ILoRA, squared_distance
from pencil import context, examples, learn, stack, texts

ROWS = texts([6, 7, 8, 9], [9, 8, 7, 6], [7, 7, 9, 9], answer_from=2)


def test_the_distance_of_hidden_states_by_hand() -> None:
    zero = torch.zeros(1, 2, 2)
    one, other = torch.tensor([[[1.0, 3.0], [9.0, 9.0]]]), torch.tensor([[[2.0, 0.0], [9.0, 9.0]]])
    # The second token is padding: (1 + 9) / 2 in one layer, 4 / 2 in the other.
    assert squared_distance((one, other), (zero, zero), torch.tensor([[1, 0]])).item() == 3.5


def test_the_target_is_the_slow_state_not_the_larger_of_both() -> None:
    fast = torch.tensor([[[2.0, -2.0]]], requires_grad=True)
    squared_distance((fast,), (torch.zeros(1, 1, 2),), torch.ones(1, 1)).backward()
    assert fast.grad is not None
    assert fast.grad.tolist() == [[[2.0, -2.0]]]  # where fast is larger it is pulled as well


def second_task(method: ILoRA, model: Any) -> Context:
    """A model in the second task, whose fast weights are off the slow ones."""
    first = context(model, ROWS)
    method.begin_task(first)
    method.gradients(first)
    method.end_task(first)
    ctx = context(model, ROWS, task="t1", index=1)
    method.begin_task(ctx)
    model.train()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in ctx.trainable().values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=g))
            weight.grad = torch.zeros_like(weight)
    return ctx


@pytest.mark.parametrize("lora", [False, True])
def test_the_gradient_is_that_of_both_terms(lora: bool) -> None:
    model: Any = pico.adapted(pico.causal_lm(16)) if lora else pico.causal_lm(16)
    method = ILoRA(strength=3.0, rows=3)
    ctx = second_task(method, model)
    slow = {n.removeprefix("slow/"): t for n, t in method.state().tensors.items() if "slow" in n}
    ctx.grad_scale = 2.0
    method.gradients(ctx)
    got = [weight.grad for weight in ctx.trainable().values()]

    ids = stack(list(ROWS))["input_ids"]  # all rows are drawn
    fast = {n: p.detach().clone() for n, p in ctx.trainable().items()}
    assert fast.keys() == slow.keys()

    def states(weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            for name, weight in ctx.trainable().items():
                weight.copy_(weights[name])
        return model(input_ids=ids, output_hidden_states=True)

    target = states(slow).hidden_states
    out = states(fast)
    pairs = zip(out.hidden_states, target, strict=True)
    gaps = [(f - s.detach()).square().mean() for f, s in pairs]
    loss = F.cross_entropy(out.logits[:, 1:3].reshape(-1, 16), ids[:, 2:].reshape(-1))
    mean = torch.stack(gaps).mean()
    loss = loss + 3.0 * mean
    want = torch.autograd.grad(loss, list(ctx.trainable().values()), materialize_grads=True)
    for mine, theirs in zip(got, want, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, 2 * theirs, atol=1e-6, rtol=1e-4)
    shown = method.evidence()
    assert shown["rows_replayed"] == 3
    assert shown["hidden_distance"] == pytest.approx(float(mean.detach()), rel=1e-4)


def test_at_strength_0_it_is_replay_alone() -> None:
    found = []
    for strength in (0.0, 1.0):
        model = pico.causal_lm(16)
        method = ILoRA(strength=strength)
        ctx = second_task(method, model)
        method.gradients(ctx)
        found.append([w.grad.clone() for w in ctx.trainable().values() if w.grad is not None])
        assert (method.evidence()["hidden_distance"] > 0) == (strength > 0)
    assert any(not torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_mode_and_the_random_state_stay_as_they_are() -> None:
    model = pico.adapted(pico.causal_lm(16))
    method = ILoRA()
    ctx = second_task(method, model)
    before = torch.get_rng_state()
    method.gradients(ctx)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


def test_in_the_first_task_nothing_is_replayed() -> None:
    model, method = pico.causal_lm(16), ILoRA()
    ctx = context(model, ROWS)
    method.begin_task(ctx)
    for weight in ctx.trainable().values():
        weight.grad = torch.zeros_like(weight)
    method.gradients(ctx)
    assert not any(w.grad is not None and w.grad.any() for w in ctx.trainable().values())
    assert "rows_replayed" not in method.evidence()


def test_at_most_so_many_rows_are_kept_and_memory_says_so() -> None:
    model, method = pico.adapted(pico.causal_lm(16)), ILoRA(size=2)
    method.gradients(context(model, ROWS))
    learn(model, method, 0)
    tensors = method.state().tensors
    assert len(tensors["rows/tasks"]) == 1  # `learn` has one row
    assert method.declared_bytes(context(model)) == sum(t.nbytes for t in tensors.values())


def test_a_classifier_is_replayed_by_its_rows() -> None:
    model, method = pico.classifier(3), ILoRA(rows=4)
    rows = examples((6, 0), (7, 2))
    first = context(model, rows)
    method.begin_task(first)
    method.gradients(first)
    method.end_task(first)
    ctx = context(model, rows, task="t1", index=1)
    method.begin_task(ctx)
    model.train()
    for weight in ctx.trainable().values():
        weight.grad = torch.zeros_like(weight)
    method.gradients(ctx)
    loss = F.cross_entropy(model(torch.tensor([[6], [7]])).logits, torch.tensor([0, 2]))
    want = torch.autograd.grad(loss, list(ctx.trainable().values()), materialize_grads=True)
    for weight, gradient in zip(ctx.trainable().values(), want, strict=True):
        torch.testing.assert_close(weight.grad, gradient, atol=1e-6, rtol=1e-4)
