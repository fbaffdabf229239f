"""Label smoothing: its loss by hand and by the textbook's formula."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from keeptune.methods.label_smoothing import LabelSmoothing, lead
from pencil import Softmax, context, examples, stack, texts


def test_the_lead_by_hand() -> None:
    logits = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
    assert lead(logits, torch.tensor([0, 0])).tolist() == [2.0, -1.0]


def test_it_is_the_difference_to_the_uniform_targets_loss() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 7, generator=g, dtype=torch.float64)
    labels = torch.tensor([0, 6, 3, 3])
    uniform = -logits.log_softmax(-1).mean(-1)
    own = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(lead(logits, labels), uniform - own)


@pytest.mark.parametrize("smoothing", [0.05, 0.1, 0.9])
def test_with_the_trainers_loss_it_is_torchs_smoothed_loss(smoothing: float) -> None:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, 9, generator=g, dtype=torch.float64, requires_grad=True)
    rows = texts([1, 2, 3, 4], [5, 6, 7, 8], answer_from=2)
    batch, ctx = stack(list(rows)), context(Softmax([[0.0]]), rows, answers_in_step=4.0)
    term = LabelSmoothing(smoothing=smoothing).loss(ctx, batch, SimpleNamespace(logits=logits))
    answers, labels = ctx.answer_logits(logits, batch), ctx.answer_labels(batch)
    want = F.cross_entropy(answers, labels, label_smoothing=smoothing)
    torch.testing.assert_close(F.cross_entropy(answers, labels) + term, want)
    (got,) = torch.autograd.grad(F.cross_entropy(answers, labels) + term, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(want, logits)
    torch.testing.assert_close(got, expected)


def test_sixteen_bit_logits_are_averaged_in_thirty_two() -> None:
    logits = torch.full((1, 4096), 1.0).bfloat16()
    logits[0, 0] = 257.0  # 256 in bfloat16
    assert lead(logits, torch.tensor([0])).item() == pytest.approx(255 - 255 / 4096)


def test_evidence_counts_answers_and_their_lead() -> None:
    model, method = Softmax([[math.log(3), 0.0]]), LabelSmoothing()
    ctx = context(model, examples((0, 0), (0, 1)))
    method.begin_task(ctx)
    batch = stack(list(ctx.dataset))
    method.loss(ctx, batch, model(batch["input_ids"]))
    assert method.evidence() == {"answers_smoothed": 2, "lead": pytest.approx(0.0)}


def test_switched_off_it_has_no_term() -> None:
    assert LabelSmoothing(smoothing=0).loss(context(Softmax([[0.0]])), {}, None) is None
