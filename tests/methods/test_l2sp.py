"""L2-SP by hand on few numbers: to what it pulls, how, and what is free."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import pico
from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.methods.l2sp import L2SP
from pencil import Softmax, context


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def put(model: Softmax, *values: float) -> None:
    """Move the only row of weights."""
    with torch.no_grad():
        model.weight[0] = tensor(*values)


def gradient_of(parameter: nn.Parameter) -> list[float]:
    assert parameter.grad is not None
    return list(parameter.grad.view(-1).tolist())


def begun(method: L2SP, *start: float) -> tuple[Softmax, Context]:
    """A first task that begins at these weights."""
    model = Softmax([start])
    ctx = context(model, learning_rate=0.1, step=1)
    method.begin_task(ctx)
    return model, ctx


# -- to what --------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_penalty() -> None:
    method = L2SP(strength=3)
    model, ctx = begun(method, 1.0, -1.0)
    put(model, 1.5, 1.0)
    penalty = 0.5 * 3 * (model.weight - tensor(1.0, -1.0)).square().sum()
    (want,) = torch.autograd.grad(penalty, model.weight)
    model.weight.grad = tensor(1.0, 1.0)[None]
    method.gradients(ctx)
    torch.testing.assert_close(model.weight.grad, 1.0 + want)
    assert gradient_of(model.weight) == [1 + 3 * 0.5, 1 + 3 * 2.0]


@pytest.mark.parametrize(("to", "pull"), [("task", 2 - 1.5), ("base", 2 - 1.0)])
def test_the_second_task_is_pulled_to_where_it_began_or_to_the_first(to: str, pull: float) -> None:
    method = L2SP(strength=10, to=to)
    model, ctx = begun(method, 1.0)
    put(model, 1.5)
    method.end_task(ctx)
    ctx = context(model, index=1)
    method.begin_task(ctx)
    put(model, 2.0)
    method.gradients(ctx)
    assert gradient_of(model.weight) == [10 * pull]


@pytest.mark.parametrize("to", ["task", "base"])
@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
def test_it_goes_on_bit_for_bit_in_the_middle_of_a_task(to: str, place: str) -> None:
    # A run that goes on begins the task first, at the weights of the middle of it.
    method, again = (L2SP(strength=10, to=to, place=place) for _ in range(2))
    model, _ = begun(method, 1.0, 0.1)
    put(model, 1.5, 0.3)
    ctx = context(model, index=1)
    method.begin_task(ctx)
    put(model, 2.0, -0.7)
    again.begin_task(ctx)
    again.restore(ctx, method.state())
    pulls = []
    for one in (method, again):
        model.weight.grad = None
        one.gradients(ctx)
        pulls.append(gradient_of(model.weight))
    assert pulls[0] == pulls[1]
    assert torch.equal(*(one.state().tensors["anchor/weight"] for one in (method, again)))
    assert list(method.state().tensors) == ["anchor/weight"]
    kept = sum(t.nbytes for t in method.state().tensors.values())
    assert method.declared_bytes(ctx) == kept == 2 * 8


def test_the_pull_ends_where_the_loss_and_the_penalty_balance() -> None:
    # h/2 (w − b)² + strength/2 (w − a)² is least at (h b + strength a) / (h + strength).
    for settings in ({}, {"proximal": True}, {"decoupled": True}):
        method = L2SP(strength=3, **settings)
        model, ctx = begun(method, -1.0)
        for _ in range(300):
            model.weight.grad = 2 * (model.weight.detach() - 4.0)
            method.gradients(ctx)
            with torch.no_grad():
                model.weight.sub_(model.weight.grad, alpha=0.1)
            method.after_step(ctx)
        if settings == {"decoupled": True}:
            # w ← (w − η h (w − b)), then (1 − η λ) of the way stays: w = v − η λ (v − a).
            step = 0.1 * 3
            stay = (1 - step) * (1 - 0.1 * 2)
            want = ((1 - step) * 0.1 * 2 * 4.0 + step * -1.0) / (1 - stay)
        else:
            want = (2 * 4.0 + 3 * -1.0) / (2 + 3)
        assert model.weight.item() == pytest.approx(want), settings


# -- how ------------------------------------------------------------------------------------------


def test_decoupled_by_hand() -> None:
    # w − 0.1 · 3 · (w − a), after the step and apart from its gradient.
    method = L2SP(strength=3, decoupled=True)
    model, ctx = begun(method, 1.0, -1.0)
    put(model, 2.0, -1.0)
    model.weight.grad = tensor(7.0, 7.0)[None]
    method.gradients(ctx)
    assert gradient_of(model.weight) == [7.0, 7.0]
    method.after_step(ctx)
    torch.testing.assert_close(model.weight.detach(), tensor(1.7, -1.0)[None])


def test_decoupled_of_weights_in_bfloat16() -> None:
    method = L2SP(strength=3, decoupled=True)
    model = Softmax([[1.0, -1.0]]).bfloat16()
    ctx = context(model, learning_rate=0.1, step=1)
    method.begin_task(ctx)
    put(model, 2.0, -1.0)
    model.weight.grad = torch.ones_like(model.weight)
    method.gradients(ctx)
    method.after_step(ctx)
    assert torch.equal(model.weight.detach(), torch.tensor([[1.7, -1.0]], dtype=torch.bfloat16))


def test_decoupled_towards_0_is_adamws_weight_decay() -> None:
    ends = []
    for pull, decay in ((0.4, 0.0), (0.0, 0.4)):
        method = L2SP(strength=pull, decoupled=True)
        model, ctx = begun(method, 0.0, 0.0)
        put(model, 2.0, -1.0)
        model.weight.grad = torch.zeros_like(model.weight)
        method.gradients(ctx)
        torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=decay).step()
        method.after_step(ctx)
        ends.append(model.weight.detach())
    torch.testing.assert_close(*ends)
    torch.testing.assert_close(ends[0], tensor(2 * 0.96, -0.96)[None])


def test_an_implicit_step_by_hand_and_at_any_strength() -> None:
    # (w + c a) / (1 + c) with c = 0.1 · strength.
    for strength, want in ((10.0, 1.5), (30.0, 1.25), (1e12, 1.0)):
        method = L2SP(strength=strength, proximal=True)
        model, ctx = begun(method, 1.0)
        put(model, 2.0)
        method.gradients(ctx)
        method.after_step(ctx)
        assert model.weight.item() == pytest.approx(want)


def test_of_the_two_forms_of_one_step_only_one_can_be_had() -> None:
    with pytest.raises(MethodError, match=r"L2SP\.decoupled and L2SP\.proximal .* Choose one"):
        L2SP(decoupled=True, proximal=True)


@pytest.mark.parametrize("form", ["decoupled", "proximal"])
def test_evidence_of_a_step_after_the_optimizers_is_what_it_moved(form: str) -> None:
    # 3 → 2 at a learning rate of 0.1 is a pull of 10, beside the task's own step 6 → 3, of 30.
    strength = {"decoupled": 5.0, "proximal": 10.0}[form]
    method = L2SP(strength=strength, **{form: True})
    model, ctx = begun(method, 1.0)
    put(model, 6.0)
    model.weight.grad = tensor(7.0)[None]
    method.gradients(ctx)
    assert "gradient_share" not in method.evidence()
    put(model, 3.0)
    method.after_step(ctx)
    assert model.weight.item() == pytest.approx(2.0)
    assert method.evidence() == pytest.approx(
        {"penalty": 0.5 * strength * 25.0, "task_gradient": 30.0, "gradient_share": 0.25}
    )


def test_it_is_active_from_the_first_task_on() -> None:
    method = L2SP(strength=10)
    model, ctx = begun(method, 1.0)
    put(model, 3.0)
    model.weight.grad = tensor(60.0)[None]
    method.gradients(ctx)
    assert L2SP.active_from == 0
    assert method.evidence() == pytest.approx(
        {"penalty": 20.0, "task_gradient": 60.0, "gradient_share": 0.25}
    )


def test_an_automatic_strength_is_the_stated_share() -> None:
    # At strength 1 the pull is the distance: 0.5, then 2; the least of 0.1 · 30 / distance holds.
    method = L2SP(strength="auto", share=0.1)
    model, ctx = begun(method, 1.0)
    found = []
    for step, w in ((0, 1.0), (1, 1.5), (2, 3.0), (4, 1.1)):
        put(model, w)
        model.weight.grad = tensor(30.0)[None]
        ctx.step = step
        method.gradients(ctx)
        found.append(gradient_of(model.weight)[0] - 30.0)
    assert found == pytest.approx([0.0, 3.0, 3.0, 1.5 * 0.1])
    assert method.evidence()["strength"] == pytest.approx(1.5)


# -- what is free ---------------------------------------------------------------------------------


def two_weights() -> Softmax:
    """A model with a head of its own."""
    model = Softmax([[1.0]])
    model.score = nn.Linear(1, 1, dtype=torch.float64)
    with torch.no_grad():
        for p in model.score.parameters():
            p.fill_(1.0)
    return model


@pytest.mark.parametrize(
    ("skip", "free"),
    [
        ((), set()),
        (("score.*",), {"score.weight", "score.bias"}),
        (("*.bias", "weight"), {"score.bias", "weight"}),
        (("*weight",), {"weight", "score.weight"}),
    ],
)
@pytest.mark.parametrize("form", ["gradient", "proximal", "decoupled"])
@pytest.mark.parametrize("to", ["task", "base"])
def test_what_is_skipped_is_free(skip: tuple[str, ...], free: set[str], form: str, to: str) -> None:
    model = two_weights()
    settings = {form: True} if form != "gradient" else {}
    method = L2SP(strength=1, skip=skip, to=to, **settings)
    for index in range(2):
        ctx = context(model, index=index, learning_rate=0.1, step=3)
        method.begin_task(ctx)
        before = {}
        with torch.no_grad():
            for name, p in model.named_parameters():
                before[name] = float(p.add_(1.0))
                p.grad = None
        method.gradients(ctx)
        method.after_step(ctx)
        for name, p in model.named_parameters():
            is_pulled = p.item() != before[name] if settings else p.grad is not None
            assert is_pulled == (name not in free), name
        assert {n.removeprefix("anchor/") for n in method.state().tensors} == before.keys() - free


def test_a_pattern_may_come_as_a_list_but_not_alone() -> None:
    assert L2SP(skip=["score.*"]).skip == ("score.*",)
    with pytest.raises(MethodError, match=r"L2SP\.skip: .*got 'score\.\*'"):
        L2SP(skip="score.*")


def test_a_weight_that_is_not_trained_is_neither_kept_nor_pulled() -> None:
    model, method = two_weights(), L2SP(strength=1)
    model.weight.requires_grad_(False)
    method.begin_task(context(model))
    assert set(method.state().tensors) == {"anchor/score.weight", "anchor/score.bias"}
    model.score.requires_grad_(False)
    model.weight.requires_grad_(True)
    method.gradients(context(model, step=1))
    assert all(p.grad is None for p in model.parameters())
    # What is trained in the second task only is anchored where that one begins.
    method.begin_task(context(model, index=1))
    put(model, 3.0)
    method.gradients(context(model, index=1))
    assert gradient_of(model.weight) == [2.0]


def test_under_lora_the_factors_and_the_head_are_held() -> None:
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    model = pico.adapted(pico.classifier(2), config)
    ctx = context(model)
    method = L2SP(strength=2)
    method.begin_task(ctx)
    trained = ctx.trainable()
    assert {n.removeprefix("anchor/") for n in method.state().tensors} == set(trained)
    assert {n.split(".")[-3] for n in trained} == {"lora_A", "lora_B", "modules_to_save"}
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.5)
    method.gradients(ctx)
    for p in trained.values():
        assert gradient_of(p) == pytest.approx([1.0] * p.numel(), rel=1e-5)


@pytest.mark.parametrize("form", ["gradient", "proximal", "decoupled"])
def test_switched_off_it_keeps_and_does_nothing(form: str) -> None:
    settings: dict[str, Any] = {form: True} if form != "gradient" else {}
    method = L2SP(strength=0, **settings)
    assert method.is_neutral()
    model, ctx = begun(method, 1.0)
    put(model, 3.0)
    method.gradients(ctx)
    method.after_step(ctx)
    assert model.weight.grad is None
    assert model.weight.item() == 3.0
    assert method.state().tensors == {}
    assert method.evidence() == {}
