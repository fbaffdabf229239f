"""Entropy-adaptive fine-tuning: learn little where the model is sure, whatever the data say.

Paper: Diao et al. 2026, Entropy-adaptive fine-tuning: resolving confident conflicts to mitigate
    forgetting, https://arxiv.org/abs/2601.02151
Equation: mean over answers of w_t (−log p_w(y_t)) with w_t = H̃_t^power held fixed; H̃_t = H_t / ln k
    and H_t the entropy of softmax over the k = top_k largest logits, 0 ≤ H̃_t ≤ 1. With mask > 0,
    w_t = 0 for confident conflicts: H̃_t and p_w(y_t) both among the lowest share mask of the task
Changes: loss
Cost: the largest k logits of each answer and its cross-entropy once more. mask: one forward pass
    over at most `examples` rows when a task begins.
Use when: no old data may be kept, and the model's knowledge shall survive data that contradict it;
    the first task is held as well.
Not when: the contradiction is what is to be learned (a corrected fact, a new format), since these
    are the answers that count least.
Differs from the paper: divides by ln k exactly where the code has 3.0 for k = 20, and by ln V for
    fewer answers than that. Masking is the paper's rival method, with the limits at its lowest 15 %
    (mask 0.15, power 0): here they are quantiles over rows of the task, of the model before it.
Status: contract tested
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor
from torch.nn import functional as F

from keeptune.method import Batch, Context, Method, State, wide
from keeptune.methods._anchor.undisturbed import undisturbed
from keeptune.methods._distil import Sums
from keeptune.processes import reshard

ROWS = 8  # rows in one forward of the pass for the limits


def top_entropy(logits: Tensor, top_k: int) -> Tensor:
    """Entropy of softmax over the k largest logits, over ln k: [N, V] to [N], 0 to 1."""
    largest = logits.topk(min(top_k, logits.shape[-1]), sorted=False).values
    log_p = wide(largest).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (entropy / math.log(largest.shape[-1])).clamp(0, 1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p of each answer: [N, V] and [N] to [N], in nats."""
    return F.cross_entropy(wide(logits), labels, reduction="none")


class EAFT(Method):
    """Weigh each answer by the model's own uncertainty about it."""

    power: float = Field(1.0, ge=0, description="power of the entropy; the code's alpha")
    top_k: int = Field(20, ge=2, description="largest logits whose entropy is taken")
    mask: float = Field(
        0.0, ge=0, lt=1, description="lowest share, of entropy and of probability, left out"
    )
    examples: int = Field(256, ge=1, description="rows per task for the mask's limits, at most")

    neutral: ClassVar[dict[str, Any]] = {"power": 0.0, "mask": 0.0}
    proof: ClassVar[str] = "weight_removed"
    active_from: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    _limits: Tensor = PrivateAttr(default_factory=lambda: torch.zeros(2))
    _sums: Sums = PrivateAttr(default_factory=lambda: Sums(4))

    def begin_task(self, ctx: Context) -> None:
        """Count anew, and look where the lowest entropies and probabilities lie."""
        self._sums = Sums(4, ctx.device)
        self._limits = self._lowest(ctx) if self.mask else torch.zeros(2, device=ctx.device)

    @torch.no_grad()
    def _lowest(self, ctx: Context) -> Tensor:
        """The `mask` quantiles of entropy and of the answer's probability: [2]."""
        chosen = ctx.random("eaft").permutation(len(ctx.dataset))[: self.examples].tolist()
        found = []
        with undisturbed(ctx, {}):
            for begin in range(0, len(chosen), ROWS):
                batch = ctx.batch([ctx.dataset[row] for row in chosen[begin : begin + ROWS]])
                logits = ctx.answer_logits(ctx.outputs(batch).logits, batch)
                p = (-cross_entropy(logits, ctx.answer_labels(batch))).exp()
                found.append(torch.stack([top_entropy(logits, self.top_k), p]))
        reshard(ctx.model)
        values = torch.cat(found, 1).sort(1).values
        return values[:, int(self.mask * values.shape[1])].clone()  # the others are let go

    def loss(self, ctx: Context, batch: Batch, outputs: Any) -> Tensor | None:
        """What the weights add to the trainer's own loss of one micro batch."""
        if self.is_neutral():
            return None
        logits = ctx.answer_logits(outputs.logits, batch)
        losses = cross_entropy(logits, ctx.answer_labels(batch))
        with torch.no_grad():
            entropy = top_entropy(logits, self.top_k)
            conflict = (entropy < self._limits[0]) & ((-losses).exp() < self._limits[1])
            weights = entropy.pow(self.power).masked_fill(conflict, 0)
            for i, values in enumerate((weights, entropy, conflict)):
                self._sums.add(i, values.sum())
            self._sums.add(3, losses.numel())
        return ctx.mean_over_answers((weights - 1) * losses)

    def end_task(self, ctx: Context) -> None:
        """Add up what the processes counted."""
        self._sums.total()

    def evidence(self) -> dict[str, Any]:
        """Over all answers: mean weight taken away, mean entropy (0 to 1), share masked."""
        weight, entropy, masked, answers = self._sums.values()
        count = max(answers, 1)
        return {
            "weight_removed": (answers - weight) / count,
            "entropy": entropy / count,
            "masked_share": masked / count,
            "answers": int(answers),
        }

    def state(self) -> State:
        """The mask's limits and what was counted."""
        return State({"limits": self._limits, "sums": self._sums.total()})

    def restore(self, ctx: Context, state: State) -> None:
        """Go on counting, by the same limits."""
        self._limits = state.tensors["limits"].to(ctx.device)
        self._sums = Sums.of(state.tensors["sums"], ctx.device)

    def declared_bytes(self, ctx: Context) -> int:
        """Six numbers."""
        return self._limits.nbytes + self._sums.nbytes
