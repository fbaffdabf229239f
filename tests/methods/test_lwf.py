"""Learning without forgetting: whose answers it holds on to, computed or recorded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

import pico
from keeptune import processes
from keeptune.errors import DataError, MethodError
from keeptune.method import Context
from keeptune.methods.lwf import LwF
from pencil import Softmax, added, context, examples, stack, texts

RECORDED = {"targets": "recorded", "top_k": 16}


def softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)) of each row: [N, V] to [N], in nats."""
    p, q = (logits.div(temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * (q.exp() * (q - p)).sum(-1)


ROWS = texts([6, 7, 8, 9], [9, 8, 7, 6], answer_from=2)


def term(method: LwF, ctx: Context, rows: Any = ROWS, answers: float = 4.0) -> Tensor:
    """The method's term on one micro batch of a step with so many answers."""
    ctx.answers_in_step = answers
    ctx.model.train()
    return added(method, ctx, rows)


def begun(method: LwF, ctx: Context) -> LwF:
    """At the start of a task."""
    method.begin_task(ctx)
    method.data(ctx, ctx.dataset)
    return method


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


def test_nor_is_there_at_recorded_answers_but_for_their_rounding() -> None:
    model = pico.causal_lm(16)
    ctx = context(model, ROWS)
    for top_k in (16, 3):
        method = begun(LwF(targets="recorded", top_k=top_k), ctx)
        loss = term(method, ctx)
        assert abs(loss.item()) < 1e-5
        moved(model, 0.3)
        assert term(method, ctx).item() > 100 * abs(loss.item())


@pytest.mark.parametrize("settings", [{}, RECORDED], ids=["online", "recorded"])
def test_the_teacher_is_the_model_before_this_task(settings: dict[str, Any]) -> None:
    model, method = pico.causal_lm(16), LwF(strength=3.0, temperature=1.0, **settings)
    for index in range(2):
        ctx = context(model, ROWS, index=index)
        begun(method, ctx)
        with torch.no_grad():
            old = ctx.answer_logits(model(**_inputs()).logits, stack(list(ROWS)))
        term(method, ctx)
        moved(model)
        with torch.no_grad():
            new = ctx.answer_logits(model(**_inputs()).logits, stack(list(ROWS)))
        want = 3.0 * softened_kl(new, old, 1.0).mean()
        near = 1e-2 if settings else 1e-5  # recorded ones are rounded to 16 bits
        assert term(method, ctx).item() == pytest.approx(want.item(), rel=near)
        method.end_task(ctx)


def _inputs() -> dict[str, Tensor]:
    return {"input_ids": stack(list(ROWS))["input_ids"]}


@pytest.mark.parametrize("settings", [{}, RECORDED], ids=["online", "recorded"])
def test_micro_batches_add_up_to_the_whole_batch(settings: dict[str, Any]) -> None:
    model, method = pico.causal_lm(16), LwF(**settings)
    ctx = context(model, ROWS)
    begun(method, ctx)
    term(method, ctx)
    moved(model)
    whole = term(method, ctx)
    parts = [term(method, ctx, rows=[row]) for row in ROWS]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-5)


class Follows(LwF):
    """The fault that is looked for: its teacher is the student of the moment."""

    def _look_back(self, ctx: Context) -> None:
        self._teacher_of = -1
        super()._look_back(ctx)


def test_a_teacher_that_follows_the_student_is_seen() -> None:
    model = pico.causal_lm(16)
    ctx = context(model, ROWS)
    for cls, holds in ((LwF, True), (Follows, False)):
        method = begun(cls(), ctx)
        term(method, ctx)
        moved(model)
        assert (term(method, ctx).item() > 1e-4) == holds


def test_recorded_rows_are_found_in_any_batch_and_others_are_free() -> None:
    model = pico.causal_lm(16)
    ctx = context(model, ROWS)
    method = begun(LwF(**RECORDED), ctx)
    moved(model)
    one, two = (term(method, ctx, rows=[row]).item() for row in ROWS)
    assert term(method, ctx, rows=list(ROWS)[::-1]).item() == pytest.approx(one + two, rel=1e-5)
    strangers = list(texts([1, 2, 3, 4], answer_from=2))
    assert term(method, ctx, rows=strangers).item() == 0
    assert term(method, ctx, rows=[*strangers, ROWS[1]]).item() == pytest.approx(two, rel=1e-5)
    # The same tokens with another question and answer are another row.
    assert term(method, ctx, rows=list(texts([6, 7, 8, 9], answer_from=1))).item() == 0
    method.end_task(ctx)
    assert method.evidence()["answers"] == 2 + 2 + 4 + 2


def test_padding_on_either_side_changes_nothing() -> None:
    model = pico.causal_lm(16)
    ctx = context(model, ROWS)
    method = begun(LwF(**RECORDED), ctx)
    moved(model)
    want = term(method, ctx, rows=[ROWS[0]]).item()
    for left, right in ((2, 0), (0, 2)):
        padded = {
            "input_ids": torch.tensor([[0] * left + ROWS[0]["input_ids"] + [0] * right]),
            "labels": torch.tensor([[-100] * left + ROWS[0]["labels"] + [-100] * right]),
            "attention_mask": torch.tensor([[0] * left + [1] * 4 + [0] * right]),
        }
        ctx.answers = ctx.read(padded)
        method.loss(ctx, padded, None)
        total = ctx.answers.total()
        assert total is not None
        # Right padding is not looked at; on the left the positions are others.
        assert total.item() == pytest.approx(want, rel=1e-5 if right else 0.5)


def test_packed_rows_cannot_be_recorded() -> None:
    packed = Dataset.from_dict({"input_ids": [[6, 7]], "labels": [[6, 7]], "seq_lengths": [[1, 1]]})
    with pytest.raises(DataError, match=r"are packed.*`packing`"):
        begun(LwF(**RECORDED), context(pico.causal_lm(16), packed))


def test_no_weight_is_copied_for_recorded_answers() -> None:
    ctx = context(pico.causal_lm(16), ROWS)
    method = begun(LwF(targets="recorded", top_k=4), ctx)
    term(method, ctx)
    answers, rows = 4, 2
    assert method.declared_bytes(ctx) == answers * (4 * 4 + 4) + rows * 32 + 24
    method.end_task(ctx)
    assert method.declared_bytes(ctx) == 24


def test_sharded_weights_can_only_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "DTensor", nn.Parameter)
    ctx = context(Softmax([[0.0]]))
    LwF(targets="recorded").begin_task(ctx)
    with pytest.raises(MethodError, match="Use `targets: recorded`"):
        LwF().begin_task(ctx)


def test_evidence_is_the_mean_over_all_answers() -> None:
    model, method = Softmax([[0.0, 0.0]]), LwF(temperature=1.0)
    ctx = context(model)
    pair = examples((0, 0), (0, 1))
    added(method, ctx, pair)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[math.log(3), 0.0]]))
    added(method, ctx, pair)
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


def test_answers_that_no_recording_has_are_no_evidence() -> None:
    model = Softmax([[1.0, 0.0], [0.0, 2.0]])
    ctx = context(model, examples((0, 0)))
    method = begun(LwF(targets="recorded"), ctx)
    moved(model)
    other = added(method, ctx, examples((1, 1)))
    assert other.item() == 0.0
    method.end_task(ctx)
    assert method.evidence()["kl"] == 0.0
