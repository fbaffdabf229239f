"""The model as it was before a task, asked while the task is learned."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from keeptune.method import Batch, Context, wide


@dataclass
class Before:
    """One copy of the trained weights, and what the model says with them.

    Attributes:
        weights: By name; empty where no copy was taken.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, tensors: dict[str, Tensor], device: torch.device) -> Before:
        """Out of a state, where the names begin with "before/"."""
        start = "before/"
        own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
        return cls({n: t.to(device) for n, t in own.items()})

    def take_once(self, ctx: Context) -> None:
        """Copy the weights as they are now, if that was not done.

        At the first batch of a task, not before: other methods may still move weights until then.
        """
        if not self.weights:
            self.weights = {n: p.detach().clone() for n, p in ctx.trainable().items()}

    @torch.no_grad()
    def logits(self, ctx: Context, batch: Batch) -> Tensor:
        """What the model said before the task: [B, L, V], without dropout."""
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        ctx.model.eval()
        found: Tensor = functional_call(
            ctx.model, self.weights, (), inputs, tie_weights=True
        ).logits
        ctx.model.train()
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return sum(tensor.nbytes for tensor in self.weights.values())


def softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)) of each row: [N, V] to [N], in nats."""
    p = F.log_softmax(wide(teacher) / temperature, -1)
    q = F.log_softmax(wide(student) / temperature, -1)
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
