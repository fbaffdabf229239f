"""T² · KL and its gradients, by hand and against autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from keeptune.answers import Answers, Head
from keeptune.head_pass import CrossEntropy
from keeptune.methods._distil import Recorded, Teacher, TopK, record

CPU = torch.device("cpu")


def values_of(logits: Tensor, term: Any) -> Tensor:
    """The term's values."""
    answers, seen = Answers(logits), []
    answers.add(term, 1.0, seen.append)
    answers.total()
    return seen[0]


def gradient_of(logits: Tensor, term: Any, weight: Any = 1.0) -> Tensor:
    """Of the weighted sum with respect to the logits."""
    leaf = logits.clone().requires_grad_()
    answers = Answers(leaf)
    answers.add(term, weight)
    total = answers.total()
    assert total is not None
    return torch.autograd.grad(total, leaf)[0]


def exact(logits: Tensor, top_k: int, temperature: float) -> TopK:
    """What would be recorded, without rounding."""
    q = (logits / temperature).softmax(-1)
    kept = q.topk(top_k)
    return TopK(kept.indices, kept.values, (1 - kept.values.sum(-1)).clamp_min(0), temperature)


def pair(n: int = 6, vocabulary: int = 17) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, n, vocabulary, generator=g, dtype=torch.float64)
    return student, teacher


def test_a_teachers_kl_by_hand() -> None:
    # At T = 2 the logits 2 ln 3 and 0 are the odds 3 : 1; the student says 1 : 1.
    teacher, student = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    back = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    forward = values_of(student, Teacher(Answers(teacher), 2.0))
    reverse = values_of(student, Teacher(Answers(teacher), 2.0, reverse=True))
    assert forward.item() == pytest.approx(4 * kl, rel=1e-6)
    assert reverse.item() == pytest.approx(4 * back, rel=1e-6)


def test_a_bucket_by_hand() -> None:
    # q = (1/2 | 1/2), p = (1/4 | 3/4): the bucket is one entry, however many are in it.
    term = TopK(torch.tensor([[2]]), torch.tensor([[0.5]]), torch.tensor([0.5]), 1.0)
    student = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    kl = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert values_of(student, term).item() == pytest.approx(kl, rel=1e-6)
    # The one goes up by 1/4, and the three others down by 1/12 each.
    want = torch.tensor([[1 / 12, 1 / 12, -1 / 4, 1 / 12]])
    torch.testing.assert_close(gradient_of(student, term), want)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 20.0])
@pytest.mark.parametrize("kind", ["forward", "reverse", "top 3", "all"])
def test_gradients_are_autograds(kind: str, temperature: float) -> None:
    student, teacher = pair()
    weight = torch.linspace(0.1, 1, 6, dtype=torch.float64)
    leaf = student.clone().requires_grad_()
    q, p = (teacher / temperature).softmax(-1), (leaf / temperature).softmax(-1)
    term: Any = Teacher(Answers(teacher), temperature, kind == "reverse")
    if kind in ("top 3", "all"):
        k = 3 if kind == "top 3" else 17
        term = exact(teacher, k, temperature)
        at = term.ids_
        if kind == "top 3":  # one more entry for all that are not known
            p = torch.cat([p.gather(1, at), 1 - p.gather(1, at).sum(1, keepdim=True)], 1)
            q = torch.cat([q.gather(1, at), 1 - q.gather(1, at).sum(1, keepdim=True)], 1)
    one, other = (p, q) if kind == "reverse" else (q, p)
    kl = temperature**2 * (one * (one / other).log()).sum(-1)
    torch.testing.assert_close(values_of(student, term), kl.detach())
    (want,) = torch.autograd.grad((kl * weight).sum(), leaf)
    torch.testing.assert_close(gradient_of(student, term, weight), want, atol=1e-12, rtol=1e-6)


def test_with_all_entries_kept_it_is_the_teachers_kl() -> None:
    student, teacher = pair()
    for t in (1.0, 2.0):
        got = gradient_of(student, exact(teacher, 17, t))
        torch.testing.assert_close(got, gradient_of(student, Teacher(Answers(teacher), t)))


def test_a_hot_kl_becomes_half_the_square_of_the_logits_difference() -> None:
    # Hinton et al. 2015: for T → ∞ and centred logits, T² KL → |z − v|² / 2N.
    z, v = torch.tensor([[0.3, -0.1, -0.2]]), torch.tensor([[-0.2, 0.4, -0.2]])
    assert values_of(z, Teacher(Answers(v), 30.0)).item() == pytest.approx(
        (z - v).square().sum().item() / 6, rel=0.02
    )


def test_no_kl_and_no_pull_between_equals() -> None:
    _, logits = pair()
    for term in (Teacher(Answers(logits), 3.0), exact(logits, 5, 2.0)):
        assert values_of(logits, term).abs().max() < 1e-12
        assert gradient_of(logits, term).abs().max() < 1e-12
    rounded = record(Answers(logits), 5, 2.0).term(2.0, CPU)
    assert values_of(logits, rounded).abs().max() < 1e-5
    assert gradient_of(logits, rounded).abs().max() < 2e-3


def long_tailed(n: int = 64, vocabulary: int = 2048) -> tuple[Tensor, Tensor]:
    """Answers with about a sixth of their mass outside of 64, and a student that drifted off."""
    g = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, vocabulary + 1, dtype=torch.float64).log()
    teacher = torch.stack([-1.6 * ranks[torch.randperm(vocabulary, generator=g)] for _ in range(n)])
    return teacher, teacher + torch.randn(n, vocabulary, generator=g, dtype=torch.float64)


def renormalised(term: TopK) -> TopK:
    """The fault that is looked for: the k entries scaled up to 1, the rest forgotten."""
    return TopK(term.ids_, term.q / term.q.sum(1, keepdim=True), 0 * term.rest, term.temperature)


def test_the_bucket_keeps_the_gradient_where_renormalising_loses_it() -> None:
    teacher, student = long_tailed()
    want = gradient_of(student, Teacher(Answers(teacher), 1.0))

    def error(term: TopK) -> float:
        return float((gradient_of(student, term) - want).norm() / want.norm())

    errors = {k: error(record(Answers(teacher), k, 1.0).term(1.0, CPU)) for k in (32, 64, 128)}
    assert errors[128] < errors[64] < errors[32] < 0.06
    faulty = error(renormalised(exact(teacher, 64, 1.0)))
    assert faulty > 4 * errors[64], (faulty, errors)


def test_two_terms_and_cross_entropy_in_one_pass_are_their_sum() -> None:
    student, teacher = pair()
    terms: list[tuple[Any, float]] = [
        (CrossEntropy(torch.arange(6)), 0.5), (exact(teacher, 4, 2.0), 2.0),
        (Teacher(Answers(teacher), 2.0, True), 0.25), (Teacher(Answers(-teacher), 1.0), 0.1),
    ]  # fmt: skip
    leaf = student.clone().requires_grad_()
    answers = Answers(leaf)
    for term, weight in terms:
        answers.add(term, weight)
    total = answers.total()
    assert total is not None
    (got,) = torch.autograd.grad(total, leaf)
    want = sum(weight * gradient_of(student, term) for term, weight in terms)
    torch.testing.assert_close(got, want)


# -- what is recorded -----------------------------------------------------------------------------


def test_a_token_takes_260_bytes_at_64() -> None:
    small = record(Answers(torch.randn(3, 49_152)), 64, 1.0)
    large = record(Answers(torch.randn(3, 70_000)), 64, 1.0)
    assert small.nbytes == 3 * 260 == 3 * (4 * 64 + 4)
    assert large.nbytes == 3 * (6 * 64 + 4)


def test_recording_from_a_head_is_recording_its_logits() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 4, generator=g), torch.randn(30, 4, generator=g)
    one = record(Answers(hidden, Head(weight, None, 0.5, 2.0)), 7, 2.0)
    other = record(Answers(2 * torch.tanh(0.5 * hidden @ weight.T / 2)), 7, 2.0)
    want = (2 * torch.tanh(0.5 * hidden @ weight.T / 2) / 2).softmax(-1)
    for kept in (one, other):
        q = torch.from_numpy(kept.log_q).exp()
        ids = torch.from_numpy(kept.ids.astype("int64"))
        torch.testing.assert_close(q, want.gather(1, ids).half(), atol=1e-3, rtol=1e-2)
        torch.testing.assert_close(
            torch.from_numpy(kept.rest), 1 - want.topk(7).values.sum(1), atol=1e-6, rtol=1e-4
        )


def test_of_unknown_answers_nothing_is_known() -> None:
    kept = record(Answers(torch.randn(2, 9)), 3, 1.0)
    taken = kept.take(torch.tensor([1, -1]).numpy())
    assert isinstance(taken, Recorded)
    term = taken.term(1.0, CPU)
    assert (term.q[1] == 0).all()
    assert term.rest[1] == 1
    assert values_of(torch.randn(2, 9), term).isfinite().all()
