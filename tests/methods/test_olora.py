"""O-LoRA's two terms by hand and against autograd, and that they keep the new adapter apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pico
from keeptune.method import Context
from keeptune.methods._adapters import factors
from keeptune.methods.olora import OLoRA, overlap, overlap_gradient
from pencil import context, learn


def test_the_overlap_of_two_by_two_by_hand() -> None:
    old, new = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[3.0, -1.0], [1.0, 1.0]])
    # A_old A_newᵀ = [[1, 3], [1, -1]]
    assert overlap(old, new).item() == 6.0
    # signs [[1, 1], [1, -1]], transposed, times A_old
    assert overlap_gradient(old, new).tolist() == [[1.0, 1.0], [1.0, 3.0]]


def test_orthogonal_rows_have_no_overlap() -> None:
    old, new = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.0, 2, -3], [0, 0, 1]])
    assert overlap(old, new) == 0
    assert not overlap_gradient(old, new).any()


def test_the_closed_form_is_autograds() -> None:
    g = torch.Generator().manual_seed(0)
    old, new = torch.randn(6, 9, generator=g), torch.randn(3, 9, generator=g).requires_grad_()
    (want,) = torch.autograd.grad(overlap(old, new), new)
    torch.testing.assert_close(overlap_gradient(old, new), want)


def second_task(method: OLoRA) -> tuple[Any, Context]:
    """A model that has learned a task, in the middle of the next one."""
    model = pico.adapted(pico.causal_lm(16))
    learn(model, method, 0)
    ctx = context(model, task="t1", index=1)
    method.begin_task(ctx)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in ctx.trainable().values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=g))
            weight.grad = torch.zeros_like(weight)
    return model, ctx


def paper(model: Any, frozen: list[str], one: float, two: float) -> Tensor:
    """The terms as the authors' code has them, over all modules."""
    new = factors(model, "default")
    total = torch.zeros(())
    for name, factor in new.items():
        total = total + two * factor.norm()
        if "lora_A" in name:
            for adapter in frozen:
                total = total + one * (factors(model, adapter)[name] @ factor.T).abs().sum()
    return total


@pytest.mark.parametrize(("one", "two"), [(0.5, 0.0), (0.0, 0.1), (0.5, 0.1)])
def test_the_gradient_is_that_of_the_papers_terms(one: float, two: float) -> None:
    method = OLoRA(strength=one, norm_strength=two)
    model, ctx = second_task(method)
    method.end_task(ctx)
    learn(model, method, 2)  # two frozen adapters now
    for weight in ctx.trainable().values():
        weight.grad = torch.zeros_like(weight)
    want = torch.autograd.grad(
        paper(model, ["task_000", "task_001"], one, two),
        list(ctx.trainable().values()),
        materialize_grads=True,
    )
    ctx.grad_scale = 4.0
    method.gradients(ctx)
    for weight, gradient in zip(ctx.trainable().values(), want, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, 4 * gradient)


def test_a_b_of_zeros_has_a_norm_without_gradient() -> None:
    method = OLoRA(strength=0, norm_strength=1.0)
    model = pico.adapted(pico.causal_lm(16))
    learn(model, method, 0)
    ctx = context(model, index=1)
    method.begin_task(ctx)
    for weight in ctx.trainable().values():
        weight.grad = torch.zeros_like(weight)
    method.gradients(ctx)
    for name, weight in ctx.trainable().items():
        assert weight.grad is not None
        size = 0.0 if "lora_B" in name else 1.0
        assert weight.grad.norm().item() == pytest.approx(size, rel=1e-5)


def test_descending_the_term_makes_the_new_adapter_orthogonal() -> None:
    method = OLoRA(strength=1.0)
    model, ctx = second_task(method)
    first = paper(model, ["task_000"], 1.0, 0.0).item()
    optimizer = torch.optim.SGD(ctx.trainable().values(), lr=1e-3)
    for ctx.step in range(200):
        optimizer.zero_grad(set_to_none=False)
        method.gradients(ctx)
        optimizer.step()
    assert paper(model, ["task_000"], 1.0, 0.0).item() < 0.1 * first
    assert method.evidence()["gradient_share"] == 1.0  # there is no other gradient here


def test_in_the_first_task_there_is_no_term() -> None:
    model, method = pico.adapted(pico.causal_lm(16)), OLoRA()
    ctx = context(model)
    method.begin_task(ctx)
    for weight in ctx.trainable().values():
        weight.grad = torch.zeros_like(weight)
    method.gradients(ctx)
    assert not any(w.grad is not None and w.grad.any() for w in ctx.trainable().values())


def test_evidence_is_the_terms_share_of_the_gradient() -> None:
    method = OLoRA()
    _, ctx = second_task(method)
    weights = list(ctx.trainable().values())
    method.gradients(ctx)
    own = sum(float(w.grad.square().sum()) for w in weights if w.grad is not None) ** 0.5
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    weights[0].grad.view(-1)[0] = 6 * own  # the scale of fp16 is taken out
    ctx.step, ctx.grad_scale = 1, 2.0
    method._evidence.clear()
    method.gradients(ctx)
    assert method.evidence()["gradient_share"] == pytest.approx(0.25, rel=1e-5)
