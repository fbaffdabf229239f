"""T² · KL between the softened answers of two models, for one pass over the head.

With u = logits / T and p = softmax(u), of the student, and q of the teacher, the gradients with
respect to the student's logits are T (p − q) for KL(q ‖ p), and T p (log p − log q − KL) for
KL(p ‖ q). T² keeps them from shrinking with T (Hinton et al. 2015).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keeptune.answers import Answers


@dataclass
class TopK:
    """T² · KL(q ‖ p) over k entries and one bucket for all others.

    It is the KL of what is known of q; without the bucket, the k entries would have to be scaled
    up to 1, which makes the gradient three times as wrong at k = 64, or worse. For entries outside
    of the k, the gradient is p_j (1 − q_rest / p_rest): their share moves as a whole.

    Args:
        ids: int64 [N, k], which entries are known.
        q: [N, k], their probabilities, softened by the temperature.
        rest: [N], the probability of all others together; with `q` it sums to 1.
        temperature: T.
    """

    ids_: Tensor
    q: Tensor
    rest: Tensor
    temperature: float
    dense: ClassVar[bool] = False

    def ids(self, span: slice) -> Tensor:
        """The k entries."""
        return self.ids_[span]

    def of(self, span: slice, log_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `keeptune.head_pass.Sparse`."""
        q, q_rest, p = self.q[span], self.rest[span], log_p.exp()
        p_rest = (1 - p.sum(1)).clamp_min(torch.finfo(p.dtype).eps)
        values = (torch.xlogy(q, q) - q * log_p).sum(1)
        values += torch.xlogy(q_rest, q_rest) - q_rest * p_rest.log()
        t, ratio = self.temperature, q_rest / p_rest
        return t * t * values, t * (1 - ratio), t * (p * ratio[:, None] - q)


@dataclass
class Teacher:
    """T² · KL over all entries, against another model's answers.

    Args:
        answers: As many as the student's; nothing is learned by them.
        temperature: T.
        reverse: KL(p ‖ q) instead of KL(q ‖ p).
    """

    answers: Answers
    temperature: float
    reverse: bool = False
    dense: ClassVar[bool] = True

    def given(self, span: slice) -> Tensor:
        """Its logits."""
        return self.answers.logits(span)

    def of(self, given: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """See `keeptune.head_pass.Dense`."""
        t = self.temperature
        log_q = given.to(log_p.dtype).div_(t)
        log_q.sub_(log_q.logsumexp(1, keepdim=True))
        if self.reverse:
            gap, p = log_q.neg_().add_(log_p), log_p.exp()
            kl = _dot(p, gap)
            return t * t * kl, gap.sub_(kl[:, None]).mul_(p).mul_(t)
        gap = log_q - log_p
        q = log_q.exp_()
        kl = _dot(q, gap)
        return t * t * kl, torch.exp(log_p, out=gap).sub_(q).mul_(t)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Σ over V, without an array of the products."""
    return torch.einsum("nv,nv->n", one, other)
