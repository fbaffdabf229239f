"""What a model says at the answers of a batch, without the logits of all of them at once.

A head makes V logits of each hidden state. Cross-entropy, and terms that hold the answers to those
of another model, need them one chunk after another only, and each gives its gradient in closed
form; so one pass over the head has the loss and the gradients, in memory that grows neither with
the number of answers nor with V, beyond the weight's own gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from keeptune.head_pass import Term, Work, in_32_bits, spans

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

    def chunks(self, parts: int = 1) -> Iterator[slice]:
        """Spans of answers; so many [chunk, V] fit into the room that is set."""
        return spans(len(self), self.vocabulary, self.values.device, parts)

    @cached_property
    def weight(self) -> Tensor | None:
        """The head's [V, d] in the type of the hidden states; cast once, since V is large."""
        return None if self.head is None else self.head.weight.detach().to(self.values.dtype)

    @torch.no_grad()
    def logits(self, span: slice) -> Tensor:
        """Logits of some answers: [n, V] in float32 at least, memory of their own."""
        values = self.values[span]
        if self.head is None:
            return values.to(in_32_bits(values), copy=True)
        assert self.weight is not None
        found = values @ self.weight.T
        if self.head.bias is not None:
            found += self.head.bias.to(values.dtype)
        found = found.to(in_32_bits(found))
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
        weights = torch.as_tensor(weight, device=self.values.device, dtype=in_32_bits(self.values))
        self._terms.append((term, weights.expand(len(self)), told))

    def total(self) -> Tensor | None:
        """Σ over terms and answers of weight · value, with its gradient; None without terms."""
        if not self._terms:
            return None
        terms, self._terms = self._terms, []
        work = Work(self, [(term, weights) for term, weights, _ in terms])
        total = work.total()
        for values, (*_, told) in zip(work.values, terms, strict=True):
            if told is not None:
                told(values)
        return total
