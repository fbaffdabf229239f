"""One pass over a head: a weighted sum of terms, and its gradient in closed form.

Logits are made in chunks, large enough for the matrix products; what is done to each entry is done
in blocks, small enough for a processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from keeptune.answers import Answers

# Numbers in the logits of one chunk at most, and answers in it: more make products no faster.
CHUNK, ANSWERS = 2**23, 128
CHUNK_ON_A_GPU, ANSWERS_ON_A_GPU = 2**26, 4096
BLOCK = 2**19  # numbers that are worked on at a time; on a GPU a whole chunk


class Term(Protocol):
    """A value for each answer and its gradient, from log p = log_softmax(logits / temperature)."""

    @property
    def temperature(self) -> float:
        """Above 0."""

    @property
    def dense(self) -> bool:
        """Whether it looks at all entries: it is a `Dense`, and else a `Sparse`."""


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

    def given(self, span: slice) -> Tensor:
        """What it sets against them, for a chunk of answers: [n, V], memory of its own."""

    def of(self, given: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """For a block of it, from log p [n, V], to values [n] and gradient [n, V].

        It may change both in place.
        """


@dataclass
class CrossEntropy:
    """−log p of each answer, in nats.

    Args:
        labels: int64 [N].
    """

    labels: Tensor
    temperature: ClassVar[float] = 1.0
    dense: ClassVar[bool] = False

    def ids(self, span: slice) -> Tensor:
        """The label itself."""
        return self.labels[span, None]

    def of(self, span: slice, log_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient is p, less 1 at the label."""
        values = -log_p[:, 0]
        return values, torch.ones_like(values), torch.full_like(log_p, -1)


def spans(count: int, vocabulary: int, device: torch.device, parts: int) -> Iterator[slice]:
    """Cut answers into chunks.

    Args:
        count: How many there are.
        vocabulary: Entries of an answer.
        device: Where they are.
        parts: How many arrays [chunk, V] are needed at a time.
    """
    on_cpu = device.type == "cpu"
    room, most = (CHUNK, ANSWERS) if on_cpu else (CHUNK_ON_A_GPU, ANSWERS_ON_A_GPU)
    size = max(1, min(most, room // (vocabulary * parts)))
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


@dataclass
class Work:
    """The terms of one pass, and their values once it is done.

    Attributes:
        answers: What the terms are of.
        terms: Each with the weights [N] of its values.
        values: Of each term, [N].
    """

    answers: Answers
    terms: list[tuple[Any, Tensor]]
    values: list[Tensor] = field(default_factory=list)

    def total(self) -> Tensor:
        """Σ over terms and answers of weight · value, with its gradient."""
        head = self.answers.head
        weight, bias = (head.weight, head.bias) if head else (None, None)
        total: Tensor = _Pass.apply(self.answers.values, weight, bias, self)  # type: ignore[no-untyped-call]
        return total

    def chunks(self) -> Iterator[slice]:
        """Spans of which the logits, and what dense terms set against them, fit into the room."""
        parts = 1 + sum(term.dense for term, _ in self.terms)
        return self.answers.chunks(parts)

    def turn(self, span: slice, logits: Tensor) -> None:
        """Make of a chunk's logits the gradient with respect to them."""
        given = [term.given(span) if term.dense else None for term, _ in self.terms]
        n, vocabulary = logits.shape
        size = max(1, BLOCK // vocabulary) if logits.device.type == "cpu" else n
        for begin in range(0, n, size):
            block = slice(begin, min(begin + size, n))
            at = slice(span.start + block.start, span.start + block.stop)
            self._turn_block(at, logits[block], [g if g is None else g[block] for g in given])

    def _turn_block(self, span: slice, logits: Tensor, given: list[Tensor | None]) -> None:
        """As `turn`, for so few answers that all that is done to them is done in the cache."""
        picked = [None if t.dense else logits.gather(1, t.ids(span)) for t, _ in self.terms]
        logits.sub_(top := logits.amax(1, keepdim=True))
        raised = _raised(logits, {term.temperature for term, _ in self.terms})
        parts: list[tuple[Tensor, Tensor]] = []  # arrays and what each line is multiplied by
        pulls: list[tuple[Tensor, Tensor]] = []
        for temperature, part in raised.items():
            z = part.sum(1)
            log_z, share = z.log(), torch.zeros_like(z)
            for i, (term, weights) in enumerate(self.terms):
                if term.temperature != temperature:
                    continue
                weight, at = weights[span, None], picked[i]
                if at is not None:
                    log_p = (at - top) / temperature - log_z[:, None]
                    self.values[i][span], own, pull = term.of(span, log_p)
                    share += weight[:, 0] * own
                    pulls.append((term.ids(span), pull * weight))
                else:
                    log_p = (logits / temperature).sub_(log_z[:, None])
                    self.values[i][span], pull = term.of(given[i], log_p)
                    parts.append((pull, weight))
            parts.append((part, (share / z)[:, None]))
        first, factor = parts.pop()
        torch.mul(first, factor, out=logits)
        for part, factor in parts:
            logits.addcmul_(part, factor)
        for ids, pull in pulls:
            logits.scatter_add_(1, ids, pull)


def _raised(logits: Tensor, temperatures: set[float]) -> dict[float, Tensor]:
    """exp(logits / T) for each T."""
    found: dict[float, Tensor] = {}
    for t in sorted(temperatures, reverse=True):
        # A square is much cheaper than an exponential, and 2 and 1 are what is mostly asked for.
        if 2 * t in found:
            found[t] = found[2 * t].square()
        else:
            found[t] = logits.exp() if t == 1 else (logits / t).exp_()
    return found


class _Pass(torch.autograd.Function):
    """One pass over the head, with gradients ready for the backward."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor | None, bias: Tensor | None, work: Work
    ) -> Tensor:
        head, wide = work.answers.head, in_32_bits(values)
        of_values, of_weight, of_bias, _ = ctx.needs_input_grad
        room = torch.zeros_like(values, dtype=wide) if of_values else None
        own = _zeros_if(of_weight, weight, wide)
        of_b = _zeros_if(of_bias, bias, wide)
        work.values = [values.new_zeros(len(values), dtype=wide) for _ in work.terms]
        cast = work.answers.weight
        lift = _lift(values, work)
        for span in work.chunks():
            logits = work.answers.logits(span)
            slope = None
            if head is not None and head.cap != math.inf:
                slope = (logits / head.cap).square_().neg_().add_(1)
            work.turn(span, logits)
            if cast is None or head is None:
                if room is not None:
                    room[span] = logits
                continue
            if slope is not None:
                logits.mul_(slope)
            if head.scale != 1:
                logits.mul_(head.scale)
            if of_b is not None:
                of_b += logits.sum(0)
            if lift != 1:
                logits.mul_(lift)
            gradient = logits.to(values.dtype)
            if room is not None:
                room[span] = gradient @ cast
            if own is not None and own.dtype == values.dtype:
                own.addmm_(gradient.T, values[span])
            elif own is not None:
                own += gradient.T @ values[span]
            del logits, gradient  # or the next chunk's would be there beside this one's
        if lift != 1:
            for lifted in (room, own):
                if lifted is not None:
                    lifted.div_(lift)
        ctx.found = [room, own, of_b]
        ctx.types = [None if t is None else t.dtype for t in (values, weight, bias)]
        pairs = zip(work.values, work.terms, strict=True)
        return torch.stack([(v * weights).sum() for v, (_, weights) in pairs]).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        found, ctx.found = ctx.found, None  # scaled in place, so good for once
        pairs = zip(found, ctx.types, strict=True)
        return (*(t if t is None else t.mul_(gradients[0]).to(kind) for t, kind in pairs), None)


def _lift(values: Tensor, work: Work) -> float:
    """What float16's gradients of logits are made larger by, a power of two; else 1.

    Each is a probability times a weight, in a step of thousands of answers mostly less than the
    smallest float16, and no loss scale has reached them yet. Four bits are left free above them,
    since what they are multiplied with has a range too.
    """
    if values.dtype != torch.float16 or work.answers.head is None:
        return 1.0
    largest = max((float(w.abs().max()) for _, w in work.terms if len(w)), default=0.0)
    return max(1.0, 2.0 ** -math.ceil(math.log2(16 * largest))) if largest else 1.0


def in_32_bits(values: Tensor) -> torch.dtype:
    """Their type, or float32 if that is wider."""
    return torch.promote_types(values.dtype, torch.float32)


def _zeros_if(wanted: bool, tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return torch.zeros_like(tensor, dtype=dtype) if wanted and tensor is not None else None
