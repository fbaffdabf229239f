"""Learning without forgetting: the softened KL by hand, and whose answers it holds on to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pico
from keeptune.method import Context
from keeptune.methods.lwf import LwF, softened_kl
from pencil import Softmax, context, stack, texts


def test_softened_kl_by_hand() -> None:
    # At T = 2 the logits 2 ln 3 and 0 are the odds 3 : 1; the student says 1 : 1.
    teacher, student = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert softened_kl(student, teacher, 2.0).item() == pytest.approx(4 * kl, rel=1e-6)


def test_it_is_the_teachers_kl_not_the_students() -> None:
    one, other = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    p, q = one.softmax(-1), other.softmax(-1)
    assert softened_kl(other, one, 1.0).item() == pytest.approx((p * (p / q).log()).sum().item())
    assert softened_kl(one, other, 1.0).item() == pytest.approx((q * (q / p).log()).sum().item())


def test_its_gradient_is_t_times_the_difference_of_the_softened_answers() -> None:
    g = torch.Generator().manual_seed(0)
    student = torch.randn(3, 5, generator=g, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5, generator=g, dtype=torch.float64)
    for t in (0.5, 1.0, 2.0, 20.0):
        (got,) = torch.autograd.grad(softened_kl(student, teacher, t).sum(), student)
        want = t * ((student / t).softmax(-1) - (teacher / t).softmax(-1))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-3)


def test_a_hot_kl_becomes_half_the_square_of_the_logits_difference() -> None:
    # Hinton et al. 2015: for T → ∞ and centred logits, T² KL → |z − v|² / 2N.
    z, v = torch.tensor([[0.3, -0.1, -0.2]]), torch.tensor([[-0.2, 0.4, -0.2]])
    assert softened_kl(z, v, 30.0).item() == pytest.approx(
        (z - v).square().sum().item() / 6, rel=0.02
    )


def test_no_kl_between_equals() -> None:
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    assert softened_kl(logits, logits, 3.0).abs().max() < 1e-6


ROWS = texts([6, 7, 8, 9], [9, 8, 7, 6], answer_from=2)


def term(method: LwF, ctx: Context, rows: Any = ROWS, answers: float = 4.0) -> Tensor:
    """The method's term on one micro batch of a step with so many answers."""
    batch = stack(list(rows))
    ctx.answers_in_step = answers
    ctx.model.train()
    loss = method.loss(ctx, batch, ctx.model(input_ids=batch["input_ids"]))
    assert loss is not None
    return loss


def moved(model: torch.nn.Module, by: float = 0.1) -> None:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(by * torch.randn(weight.shape, generator=g))


def test_before_the_first_step_there_is_nothing_to_hold() -> None:
    model, method = pico.causal_lm(16), LwF()
    loss = term(method, context(model, ROWS))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) < 1e-6


def test_the_teacher_is_the_model_before_this_task() -> None:
    model, method = pico.causal_lm(16), LwF(strength=3.0, temperature=1.0)
    for index in range(2):
        ctx = context(model, ROWS, index=index)
        method.begin_task(ctx)
        with torch.no_grad():
            old = ctx.answer_logits(model(**_inputs()).logits, stack(list(ROWS)))
        term(method, ctx)
        moved(model)
        with torch.no_grad():
            new = ctx.answer_logits(model(**_inputs()).logits, stack(list(ROWS)))
        want = 3.0 * softened_kl(new, old, 1.0).mean()
        assert term(method, ctx).item() == pytest.approx(want.item(), rel=1e-5)
        method.end_task(ctx)


def _inputs() -> dict[str, Tensor]:
    return {"input_ids": stack(list(ROWS))["input_ids"]}


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    model, method = pico.causal_lm(16), LwF()
    ctx = context(model, ROWS)
    term(method, ctx)
    moved(model)
    whole = term(method, ctx)
    parts = [term(method, ctx, rows=[row]) for row in ROWS]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-5)


def test_evidence_is_the_mean_over_all_answers() -> None:
    model, method = Softmax([[0.0, 0.0]]), LwF(temperature=1.0)
    ctx = context(model)
    batch = {"input_ids": torch.tensor([[0], [0]]), "labels": torch.tensor([0, 1])}
    method.loss(ctx, batch, model(input_ids=batch["input_ids"]))
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[math.log(3), 0.0]]))
    method.loss(ctx, batch, model(input_ids=batch["input_ids"]))
    # Two answers with no KL, then two with KL(1/2, 1/2 ‖ 3/4, 1/4).
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    shown = method.evidence()
    assert (shown["kl"], shown["answers"]) == (pytest.approx(kl / 2, rel=1e-6), 4)
    assert shown["extra_forward_rows"] > 0


def test_the_teacher_answers_without_dropout() -> None:
    model, method = pico.causal_lm(16), LwF(temperature=1.0)
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    term(method, context(model, ROWS))
    assert seen == [True, False]
    assert model.training


def test_a_task_learned_again_has_a_teacher_again() -> None:
    model, method = pico.causal_lm(16), LwF()
    ctx = context(model, ROWS)
    for _ in range(2):
        term(method, ctx)
        moved(model)
        assert term(method, ctx).item() > 1e-4
        method.end_task(ctx)


def test_switched_off_it_has_no_term() -> None:
    assert LwF(strength=0).loss(context(Softmax([[0.0]])), {}, None) is None
