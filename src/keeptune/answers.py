"""What a model says at the answers of a batch, without the logits of all of them at once.

A head makes V logits of each hidden state. Cross-entropy, and terms that hold the answers to those
of another model, need them one chunk after another only, and each gives its gradient in closed
form; so one pass over the head has the loss and the gradients, in memory that grows neither with
the number of answers nor with V, beyond the weight's own gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

# Numbers that the buffers of one chunk hold: 32 MiB in float32 on a CPU, 256 MiB elsewhere.
ROOM = 2**23
ROOM_ON_A_GPU = 2**26
Told = Callable[[Tensor], None]


@dataclass(frozen=True)
class Head:
    """The last linear layer, and what a model does with its output.

    Attributes:
        weight: [V, d].
        bias: [V], or None.
        scale: The output is multiplied by it.
        cap: Then z becomes cap · tanh(z / cap); infinite for no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float = math.inf


class Answers:
    """N answers, as the hidden states [N, d] before a head, or as the logits [N, V] themselves.

    Args:
        values: Hidden states, or logits when there is no head.
        head: What makes logits of them.
    """

    def __init__(self, values: Tensor, head: Head | None = None) -> None:
        self.values = values
        self.head = head
        self._terms: list[tuple[Term, Tensor, Told | None]] = []

    def __len__(self) -> int:
        return len(self.values)

    @property
    def vocabulary(self) -> int:
        """V."""
        return len(self.head.weight) if self.head else self.values.shape[-1]

    def chunks(self, buffers: int = 1) -> Iterator[slice]:
        """Spans of answers of which so many [chunk, V] fit into the room that is set."""
        room = ROOM if self.values.device.type == "cpu" else ROOM_ON_A_GPU
        size = max(1, room // (self.vocabulary * buffers))
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    @torch.no_grad()
    def logits(self, span: slice) -> Tensor:
        """Logits of some answers: [n, V] in float32 at least, memory of their own."""
        values = self.values[span]
        if self.head is None:
            return values.to(_wide(values), copy=True)
        weight, bias = (_like(t, values) for t in (self.head.weight, self.head.bias))
        assert weight is not None
        found = torch.mm(values, weight.T) if bias is None else torch.addmm(bias, values, weight.T)
        found = found.to(_wide(found))
        if self.head.scale != 1:
            found.mul_(self.head.scale)
        if self.head.cap != math.inf:
            found.div_(self.head.cap).tanh_().mul_(self.head.cap)
        return found

    def add(self, term: Term, weight: Tensor | float, told: Told | None = None) -> None:
        """Let a term into the sum.

        Args:
            term: Gives a value for each answer.
            weight: What each value is multiplied by, [N] or one for all; no gradient goes there.
            told: Called with the values, [N] without gradient, once they are known.
        """
        weights = torch.as_tensor(weight, device=self.values.device, dtype=_wide(self.values))
        self._terms.append((term, weights.expand(len(self)), told))

    def total(self) -> Tensor | None:
        """Σ over terms and answers of weight · value, with its gradient; None without terms."""
        if not self._terms:
            return None
        terms, self._terms = self._terms, []
        head = self.head
        weight, bias = (head.weight, head.bias) if head else (None, None)
        work = _Work(self, [(term, weights) for term, weights, _ in terms])
        total: Tensor = _Pass.apply(self.values, weight, bias, work)  # type: ignore[no-untyped-call]
        for values, (*_, told) in zip(work.values, terms, strict=True):
            if told is not None:
                told(values)
        return total


class Term(Protocol):
    """A value for each answer and its gradient, from log p = log_softmax(logits / temperature)."""

    @property
    def temperature(self) -> float:
        """Above 0."""

    @property
    def buffers(self) -> int:
        """[chunk, V] arrays that it needs beside the logits; 0 for a `Sparse`."""


class Sparse(Term, Protocol):
    """A term that looks at a few entries of each answer."""

    def ids(self, span: slice) -> Tensor:
        """The entries that it looks at: int64 [n, m]."""

    def of(self, span: slice, log_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From log p at these entries, [n, m], to (values, share, pulls).

        Values [n]; the gradient of each with respect to the logits is share [n] · p over all
        entries, plus pulls [n, m] at these.
        """


class Dense(Term, Protocol):
    """A term that looks at all entries of each answer."""

    def of(self, span: slice, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """From log p [n, V], which stays as it is, to values [n] and gradient [n, V]."""


@dataclass
class CrossEntropy:
    """−log p of each answer, in nats.

    Args:
        labels: int64 [N].
    """

    labels: Tensor
    temperature: ClassVar[float] = 1.0
    buffers: ClassVar[int] = 0

    def ids(self, span: slice) -> Tensor:
        """The label itself."""
        return self.labels[span, None]

    def of(self, span: slice, log_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient is p, less 1 at the label."""
        values = -log_p[:, 0]
        return values, torch.ones_like(values), torch.full_like(log_p, -1)


@dataclass
class _Work:
    """The terms of one pass, and their values once it is done."""

    answers: Answers
    terms: list[tuple[Any, Tensor]]
    values: list[Tensor] = field(default_factory=list)

    def chunks(self) -> Iterator[slice]:
        """Spans, so that logits, gradients and the terms' own buffers fit."""
        temperatures = {term.temperature for term, _ in self.terms}
        capped = self.answers.head is not None and self.answers.head.cap != math.inf
        own = max((term.buffers for term, _ in self.terms), default=0)
        yield from self.answers.chunks(len(temperatures) + capped + own)

    def of(self, span: slice, logits: Tensor) -> Tensor:
        """The gradient of the weighted sum with respect to these logits, in their place or not."""
        picked = [
            logits.gather(1, term.ids(span)) if term.buffers == 0 else None
            for term, _ in self.terms
        ]
        logits.sub_(top := logits.amax(1, keepdim=True))
        temperatures = sorted({term.temperature for term, _ in self.terms})
        gradient: Tensor | None = None
        for temperature in temperatures:
            last = temperature == temperatures[-1]
            mine = [i for i, (term, _) in enumerate(self.terms) if term.temperature == temperature]
            raised = logits if last else logits.clone()
            if temperature != 1:
                raised.div_(temperature)
            part = self._at(span, raised, mine, [_over(p, top, temperature) for p in picked])
            gradient = part if gradient is None else gradient.add_(part)
        assert gradient is not None
        return gradient

    def _at(
        self, span: slice, raised: Tensor, mine: list[int], picked: list[Tensor | None]
    ) -> Tensor:
        """The share of the terms of one temperature; `raised`, the logits, is used up."""
        share, dense = raised.new_zeros(len(raised)), []
        if any(self.terms[i][0].buffers for i in mine):
            log_z = raised.logsumexp(1)
            raised.sub_(log_z[:, None])
            for i in mine:
                term, weights = self.terms[i]
                if term.buffers:
                    values, pull = term.of(span, raised)
                    self.values[i][span] = values
                    dense.append(pull.mul_(weights[span, None]))
            raised.exp_()
            z = torch.ones_like(log_z)
        else:
            z = raised.exp_().sum(1)
            log_z = z.log()
        pulls = []
        for i in mine:
            term, weights = self.terms[i]
            if (at := picked[i]) is not None:
                values, own, pull = term.of(span, at - log_z[:, None])
                self.values[i][span] = values
                share += weights[span] * own
                pulls.append((term.ids(span), pull * weights[span, None]))
        gradient = raised.mul_((share / z)[:, None])
        for pull in dense:
            gradient.add_(pull)
        for ids, pull in pulls:
            gradient.scatter_add_(1, ids, pull)
        return gradient


def _over(picked: Tensor | None, top: Tensor, temperature: float) -> Tensor | None:
    return None if picked is None else (picked - top) / temperature


class _Pass(torch.autograd.Function):
    """One pass over the head, with gradients ready for the backward."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor | None, bias: Tensor | None, work: _Work
    ) -> Tensor:
        answers, head = work.answers, work.answers.head
        wide = _wide(values)
        of_values, of_weight, of_bias, _ = ctx.needs_input_grad
        room = torch.zeros_like(values, dtype=wide) if of_values else None
        own = _zeros_if(of_weight, weight, wide)
        of_b = _zeros_if(of_bias, bias, wide)
        work.values = [values.new_zeros(len(values), dtype=wide) for _ in work.terms]
        cast = _like(weight, values)
        for span in work.chunks():
            logits = answers.logits(span)
            slope = None
            if head is not None and head.cap != math.inf:
                slope = (logits / head.cap).square_().neg_().add_(1)
            gradient = work.of(span, logits)
            if head is None:
                if room is not None:
                    room[span] = gradient
                continue
            if slope is not None:
                gradient.mul_(slope)
            if head.scale != 1:
                gradient.mul_(head.scale)
            if of_b is not None:
                of_b += gradient.sum(0)
            gradient = gradient.to(values.dtype)
            assert cast is not None
            if room is not None:
                room[span] = gradient @ cast
            if own is not None and own.dtype == values.dtype:
                own.addmm_(gradient.T, values[span])
            elif own is not None:
                own += gradient.T @ values[span]
        ctx.found = [room, own, of_b]
        ctx.types = [None if t is None else t.dtype for t in (values, weight, bias)]
        sums = [
            (v * weights).sum() for v, (_, weights) in zip(work.values, work.terms, strict=True)
        ]
        return torch.stack(sums).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        found, ctx.found = ctx.found, None  # scaled in place, so good for once
        pairs = zip(found, ctx.types, strict=True)
        return (*(t if t is None else t.mul_(gradients[0]).to(kind) for t, kind in pairs), None)


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _like(tensor: Tensor | None, values: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(values.dtype)


def _zeros_if(wanted: bool, tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return torch.zeros_like(tensor, dtype=dtype) if wanted and tensor is not None else None


def total_of(answers: Answers, terms: Sequence[tuple[Term, Tensor | float]]) -> Tensor:
    """Σ over terms and answers of weight · value, with its gradient."""
    for term, weight in terms:
        answers.add(term, weight)
    total = answers.total()
    assert total is not None
    return total
