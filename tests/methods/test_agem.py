"""A-GEM: the projection by hand, and whose gradient stands for the old rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pico
from keeptune import processes
from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.methods._reference import angle, inner_products, mean_gradient
from keeptune.methods.agem import AGEM, share_to_add
from pencil import Softmax, context, examples, texts

OLD, NEW = examples((0, 0), (0, 0), (0, 1), (0, 0)), examples((0, 1), (0, 1))


def task_gradient(model: nn.Module, ctx: Context, rows: Any, scale: float = 1.0) -> None:
    batch = ctx.batch(list(rows))
    model.zero_grad()
    logits = ctx.answer_logits(model(batch["input_ids"]).logits, batch)
    (scale * F.cross_entropy(logits, ctx.answer_labels(batch))).backward()


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_nothing_is_added_unless_the_gradients_conflict() -> None:
    assert share_to_add(3.0, 2.0) == 0
    assert share_to_add(0.0, 0.0) == 0
    assert share_to_add(-3.0, 2.0) == 1.5
    assert math.isnan(share_to_add(math.nan, 2.0))


def test_angles_by_hand() -> None:
    assert angle(1.0, 1.0, 2.0) == pytest.approx(45)
    assert angle(-6.0, 4.0, 9.0) == pytest.approx(180)
    assert angle(0.0, 0.0, 9.0) == 90


def test_a_conflict_is_projected_away_and_no_more() -> None:
    # At logits 0 the gradient of one row is p − onehot: old rows (−1/4, 1/4), new (1/2, −1/2),
    # which are opposite, so that nothing is left; the second word is only in the new task.
    model, method = Softmax([[0.0, 0.0], [0.0, 0.0]]), AGEM(rows=4)
    method.end_task(context(model, OLD))
    ctx = context(model, NEW, index=1)
    task_gradient(model, ctx, examples((0, 1), (1, 0)))
    assert grads(model)[0].tolist() == [[0.25, -0.25], [-0.25, 0.25]]
    method.gradients(ctx)
    assert torch.allclose(
        grads(model)[0], torch.tensor([[0.0, 0.0], [-0.25, 0.25]], dtype=torch.float64)
    )
    shown = method.evidence()
    assert shown["conflict_share"] == 1
    assert shown["angles"]["earlier tasks"] == pytest.approx(135)  # −1/√2
    assert shown["reference_rows"] == shown["extra_backward_rows"] == 4


def test_a_gradient_that_helps_the_old_rows_stays_bit_for_bit() -> None:
    model, method = Softmax([[0.3, 0.1]]), AGEM(rows=4)
    method.end_task(context(model, OLD))
    ctx = context(model, OLD, index=1)
    task_gradient(model, ctx, examples((0, 0)))
    before = grads(model)
    method.gradients(ctx)
    assert torch.equal(grads(model)[0], before[0])
    assert method.evidence()["conflict_share"] == 0
    assert method.evidence()["reference_rows"] == 4


def test_after_the_projection_the_old_loss_does_not_rise() -> None:
    model, method = pico.causal_lm(16), AGEM(rows=8)
    old = texts([6, 7, 8, 9], [9, 8, 7, 6])
    method.end_task(context(model, old))
    ctx = context(model, old, index=1)
    task_gradient(model, ctx, old.select([0]), scale=-1.0)  # a task that unlearns a row
    before = grads(model)
    method.gradients(ctx)
    after = grads(model)
    # What is left is orthogonal to the reference, which is what was taken away.
    task_gradient(model, ctx, old)
    old_gradient = grads(model)
    dots = inner_products([before, old_gradient, after])
    assert dots[0, 1] < 0, "no conflict to look at"
    assert abs(dots[1, 2]) < 1e-5 * (dots[1, 1] * dots[2, 2]).sqrt()


def test_the_reference_is_the_gradient_of_the_mean_over_answers() -> None:
    model = pico.causal_lm(16)
    # Rows with one and three answers: a mean of the rows' means would be another.
    rows = texts([6, 7, 8, 9], answer_from=3).to_list() + texts([9, 8, 7, 6]).to_list()
    data = texts([6, 7, 8, 9], [9, 8, 7, 6]).from_list(rows)
    ctx = context(model, data, grad_scale=8.0)
    got = mean_gradient(ctx, list(model.parameters()), data, "any")
    task_gradient(model, ctx, data, scale=8.0)
    for one, other in zip(got, grads(model), strict=True):
        torch.testing.assert_close(one, other)


def test_scaled_gradients_are_projected_alike() -> None:
    found = []
    for scale in (1.0, 1024.0):
        model, method = Softmax([[0.2, 0.0, 0.1], [0.0, 0.3, 0.0]]), AGEM(rows=4)
        method.end_task(context(model, OLD))
        ctx = context(model, NEW, index=1, grad_scale=scale)
        task_gradient(model, ctx, examples((0, 1), (1, 0)), scale=scale)
        method.gradients(ctx)
        found.append(grads(model)[0] / scale)
    assert torch.allclose(found[0], found[1])


def test_a_reference_that_overflowed_makes_the_step_be_left_out() -> None:
    model, method = Softmax([[0.0, 0.0]]), AGEM()
    method.end_task(context(model, OLD))
    ctx = context(model, NEW, index=1)
    task_gradient(model, ctx, NEW)
    ctx.grad_scale = math.inf
    method.gradients(ctx)
    assert not grads(model)[0].isfinite().any()
    assert "conflict_share" not in method.evidence()


def test_gradients_and_random_numbers_of_others_are_left_alone() -> None:
    model = pico.adapted(pico.causal_lm(16))
    model.train()
    rows = texts([6, 7, 8, 9])
    ctx = context(model, rows)
    task_gradient(model, ctx, rows)
    before, state = grads(model), torch.get_rng_state()
    mean_gradient(ctx, [p for p in model.parameters() if p.requires_grad], rows, "any")
    assert all(torch.equal(a, b) for a, b in zip(before, grads(model), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training


def test_dropout_and_rows_depend_on_the_step_and_the_seed_only() -> None:
    class Dropped(Softmax):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            outputs = super().forward(input_ids)
            outputs.logits = F.dropout(outputs.logits, 0.5)
            return outputs

    model = Dropped([[0.5, -0.3, 0.2]] * 8)
    rows = examples(*[(word, 0) for word in range(8)])

    def reference(step: int, seed: int = 0) -> Tensor:
        torch.rand(1)  # what was drawn before must not matter
        ctx = context(model, rows, seed=seed, index=1, step=step)
        return mean_gradient(ctx, [model.weight], rows, "dropout", step)[0]

    assert torch.equal(reference(3), reference(3))
    assert not torch.equal(reference(3), reference(4))
    assert not torch.equal(reference(3), reference(3, seed=1))


def test_a_weight_that_the_step_does_not_move_is_left_alone() -> None:
    model, method = nn.Module(), AGEM(rows=4)
    model.used, model.idle = Softmax([[0.0, 0.0]]), nn.Parameter(torch.zeros(2))
    model.forward = model.used.forward
    method.end_task(context(model, OLD))
    ctx = context(model, NEW, index=1)
    task_gradient(model, ctx, NEW)
    method.gradients(ctx)
    assert model.idle.grad is None


def test_no_more_rows_are_kept_than_size() -> None:
    model, method = Softmax([[0.0, 0.0]]), AGEM(size=3)
    for index in range(2):
        method.end_task(context(model, OLD, task=f"t{index}", index=index))
    assert method.evidence()["rows_kept"] == 3


def test_without_rows_left_nothing_is_moved() -> None:
    model, method = Softmax([[0.0, 0.0]]), AGEM(rows=1)
    method.end_task(context(model, OLD))
    (buffer,) = method._buffers.values()
    buffer.delete(list(range(len(buffer))))
    ctx = context(model, NEW, index=1)
    task_gradient(model, ctx, NEW)
    before = grads(model)
    method.gradients(ctx)
    assert torch.equal(grads(model)[0], before[0])


def test_a_shortfall_is_said() -> None:
    model, method = Softmax([[0.0, 0.0]]), AGEM(rows=99)
    method.end_task(context(model, OLD))
    ctx = context(model, NEW, index=1)
    task_gradient(model, ctx, NEW)
    method.gradients(ctx)
    assert method.evidence()["rows_short"] == 99 - len(OLD)


def test_switched_off_it_keeps_and_does_nothing() -> None:
    model, method = Softmax([[0.0, 0.0]]), AGEM(rows=0)
    method.end_task(context(model, OLD))
    ctx = context(model, NEW, index=1)
    task_gradient(model, ctx, NEW)
    before = grads(model)
    method.gradients(ctx)
    assert torch.equal(grads(model)[0], before[0])
    assert method.evidence() == {"rows_kept": 0, "bytes_on_disk": 0}
    assert method.declared_bytes(ctx) == 0


def test_sharded_weights_are_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "DTensor", nn.Parameter)
    with pytest.raises(MethodError, match="'agem' cannot take a second gradient while FSDP"):
        AGEM().begin_task(context(Softmax([[0.0]])))
    AGEM(rows=0).begin_task(context(Softmax([[0.0]])))


def test_inner_products_are_those_of_the_whole_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((3, 5), (70_000,), ())
    found = [[torch.randn(shape, generator=g) for shape in shapes] for _ in range(3)]
    whole = torch.stack([torch.cat([t.flatten() for t in one]) for one in found]).double()
    torch.testing.assert_close(inner_products(found), whole @ whole.T, rtol=1e-4, atol=1e-2)
    sixteen = [[t.bfloat16() for t in one] for one in found]
    torch.testing.assert_close(inner_products(sixteen), whole @ whole.T, rtol=0.02, atol=5.0)
