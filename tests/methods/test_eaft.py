"""EAFT: entropies and weights by hand, and which answers are confident conflicts."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from keeptune.method import Context
from keeptune.methods.eaft import EAFT, top_entropy
from pencil import Softmax, context, examples, stack, texts


def test_entropies_by_hand() -> None:
    half = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    logits = torch.tensor([[math.log(3), 0.0], [1.0, 1.0], [200.0, 0.0]])
    assert top_entropy(logits, 20).tolist() == pytest.approx([half, 1.0, 0.0], abs=1e-6)


def test_only_the_largest_logits_count_and_they_are_a_distribution_of_their_own() -> None:
    # Without the two small ones, 3 : 1 is left.
    logits = torch.tensor([[-1.0, math.log(3), 0.0, -1.0]])
    want = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert top_entropy(logits, 2).item() == pytest.approx(want, rel=1e-6)


def test_twenty_equal_answers_weigh_as_an_ordinary_one() -> None:
    assert top_entropy(torch.zeros(1, 50), 20).item() == pytest.approx(1.0)


ROWS = texts([1, 2, 3, 4], [5, 6, 7, 8], answer_from=2)


def term(method: EAFT, ctx: Context, logits: Tensor) -> Tensor:
    loss = method.loss(ctx, stack(list(ROWS)), SimpleNamespace(logits=logits))
    assert loss is not None
    return loss


@pytest.mark.parametrize("power", [1.0, 2.5])
def test_with_the_trainers_loss_it_is_the_weighted_loss(power: float) -> None:
    g = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(2, 4, 40, generator=g, dtype=torch.float64)
    logits.requires_grad_()
    ctx = context(Softmax([[0.0]]), ROWS, answers_in_step=4.0)
    batch = stack(list(ROWS))
    answers, labels = ctx.answer_logits(logits, batch), ctx.answer_labels(batch)
    top = answers.detach().topk(20).values.softmax(-1)
    weights = (-(top * top.log()).sum(-1) / math.log(20)) ** power
    want = (weights * F.cross_entropy(answers, labels, reduction="none")).mean()
    got = F.cross_entropy(answers, labels) + term(EAFT(power=power), ctx, logits)
    torch.testing.assert_close(got, want)
    # The weight is held fixed: no gradient goes through the entropy.
    (moved,) = torch.autograd.grad(got, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(want, logits)
    torch.testing.assert_close(moved, expected)


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 4, 40, generator=g)
    ctx, method = context(Softmax([[0.0]]), ROWS, answers_in_step=4.0), EAFT()
    whole = term(method, ctx, logits).item()
    parts = [
        method.loss(ctx, stack([row]), SimpleNamespace(logits=one[None]))
        for row, one in zip(ROWS, logits, strict=True)
    ]
    assert sum(float(part) for part in parts if part is not None) == pytest.approx(whole, rel=1e-5)


# The model is sure about words 0 and 1, and unsure about 2 and 3.
SURE = [[4.0, 0.0], [3.0, 0.0], [0.1, 0.0], [0.0, 0.0]]
# It is told the opposite about word 0 only.
TOLD = examples((0, 1), (1, 0), (2, 0), (3, 1))


def test_confident_conflicts_are_low_in_entropy_and_in_probability() -> None:
    model, method = Softmax(SURE), EAFT(power=0.0, mask=0.5)
    ctx = context(model, TOLD, answers_in_step=4.0)
    method.begin_task(ctx)
    batch = stack(list(TOLD))
    got = method.loss(ctx, batch, model(batch["input_ids"]))
    assert got is not None
    # Word 1 is as sure but right, word 3 as unlikely but unsure.
    conflict = math.log1p(math.exp(4.0))
    assert got.item() == pytest.approx(-conflict / 4)
    assert method.evidence()["masked_share"] == 0.25
    assert method.evidence()["weight_removed"] == pytest.approx(0.25)


def test_the_limits_are_those_of_the_model_before_the_task() -> None:
    model, method = Softmax(SURE), EAFT(mask=0.5)
    ctx = context(model, TOLD)
    method.begin_task(ctx)
    before = method.state().tensors["limits"].clone()
    with torch.no_grad():
        model.weight.zero_()
    batch = stack(list(TOLD))
    method.loss(ctx, batch, model(batch["input_ids"]))
    assert torch.equal(method.state().tensors["limits"], before)
    assert model.training


def test_a_mask_of_zero_looks_at_no_row_beforehand() -> None:
    model, method = Softmax(SURE), EAFT()
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    method.begin_task(context(model, TOLD))


def test_evidence_is_over_all_answers() -> None:
    model, method = Softmax([[200.0, 0.0], [0.0, 0.0]]), EAFT()
    ctx = context(model, examples((0, 0), (1, 0)))
    method.begin_task(ctx)
    batch = stack(list(ctx.dataset))
    method.loss(ctx, batch, model(batch["input_ids"]))
    shown = method.evidence()
    assert shown == {
        "weight_removed": pytest.approx(0.5),
        "entropy": pytest.approx(0.5),
        "masked_share": 0,
        "answers": 2,
    }


def test_switched_off_it_has_no_term() -> None:
    assert EAFT(power=0).loss(context(Softmax([[0.0]])), {}, None) is None
    assert EAFT(power=0).is_neutral()
    assert not EAFT(power=0, mask=0.1).is_neutral()
