"""DER: what is recorded with a row, and the pull towards it, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import pico
from keeptune import processes
from keeptune.errors import MethodError
from keeptune.methods.der import DER
from pencil import Softmax, context, examples, stack
from rehearsed_rows import ROWS, flat, gradients, learned, moved


def test_a_classifiers_logits_are_held_by_squares() -> None:
    # (z − h)² over two classes, halved for their mean: 2 (h − z) / 2 = h − z, for each word.
    model, method = Softmax([[1.0, 2.0], [3.0, 5.0]]), DER(strength=3.0, rows=2)
    ctx = learned(method, model, examples((0, 1), (1, 0)))
    with torch.no_grad():
        model.weight += torch.tensor([[0.5, 0.0], [0.0, -2.0]])
    got = gradients(method, ctx).view(2, 2)
    # Two rows were drawn, so each weighs a half.
    want = 3.0 / 2 * torch.tensor([[0.5, 0.0], [0.0, -2.0]], dtype=torch.float64)
    torch.testing.assert_close(got, want)
    assert method.evidence()["distance"] == pytest.approx((0.5**2 / 2 + 2.0**2 / 2) / 2)


def test_a_language_models_answers_are_held_by_their_kl() -> None:
    model, method = pico.causal_lm(16), DER(strength=2.0, rows=3, top_k=16)
    batch = stack(list(ROWS))
    ctx = learned(method, model)
    with torch.no_grad():
        q = ctx.answer_logits(model(batch["input_ids"]).logits, batch).softmax(-1)
    moved(model)
    got = gradients(method, ctx)
    p = ctx.answer_logits(model(batch["input_ids"]).logits, batch).log_softmax(-1)
    kl = (q * (q.log() - p)).sum(-1)
    model.zero_grad()
    (2.0 * kl.mean()).backward()
    assert (got - flat(model)).norm() < 2e-3 * got.norm()
    assert method.evidence()["distance"] == pytest.approx(kl.mean().item(), rel=2e-3)


def test_outputs_are_those_of_the_tasks_end_and_stay_so() -> None:
    model, method = pico.causal_lm(16), DER(rows=3, size=3)
    ctx = learned(method, model)
    near = gradients(method, ctx).norm()
    moved(model)
    # A second task of no rows that are kept: what was recorded is not recorded again.
    method._buffer.seen = 10**9
    ctx = learned(method, model, index=1)
    assert gradients(method, ctx).norm() > 100 * near
    assert method.evidence()["rows_kept_by_task"] == {"t0": 3}


def test_only_rows_that_are_kept_are_looked_at() -> None:
    model, method = pico.causal_lm(16), DER(size=2)
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(len(inputs["input_ids"])), with_kwargs=True
    )
    learned(method, model)
    assert sum(seen) == 2


def test_it_draws_anew_at_each_step_and_the_same_again() -> None:
    model, method = pico.causal_lm(16), DER(rows=2)
    ctx = learned(method, model)
    moved(model)
    found = []
    for ctx.step in (0, 1, 2, 3, 0):
        found.append(gradients(method, ctx))
    assert torch.equal(found[0], found[-1])
    assert any(not torch.equal(found[0], other) for other in found[1:-1])


def test_gradients_carry_the_scale_of_fp16() -> None:
    model, method = pico.causal_lm(16), DER(rows=3)
    ctx = learned(method, model)
    moved(model)
    once = gradients(method, ctx)
    ctx.grad_scale = 8.0
    torch.testing.assert_close(gradients(method, ctx), 8 * once)


def test_a_kept_answer_token_takes_260_bytes_and_its_id() -> None:
    answers = []
    for k in (4, 64):
        method = DER(top_k=k)
        learned(method, pico.causal_lm(128))
        answers.append(method.declared_bytes(context(Softmax([[0.0]]))))
    assert answers[1] - answers[0] == 6 * 4 * (64 - 4)


def test_off_it_keeps_nothing() -> None:
    method = DER(strength=0)
    ctx = learned(method, pico.causal_lm(16))
    assert gradients(method, ctx).norm() == 0
    assert method.evidence()["rows_kept"] == 0


def test_sharded_weights_are_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "DTensor", nn.Parameter)
    with pytest.raises(MethodError, match="'der' cannot take a second gradient while FSDP"):
        DER().begin_task(context(Softmax([[0.0]])))


def test_what_is_kept_survives_a_save() -> None:
    model, method = pico.causal_lm(16), DER(rows=3)
    ctx = learned(method, model)
    moved(model)
    want: Any = gradients(method, ctx)
    again = DER(rows=3)
    again.restore(ctx, method.state())
    assert torch.equal(gradients(again, ctx), want)
    assert math.isfinite(again.evidence()["distance"])
