"""Label smoothing: a little of each target goes to all other answers.

Paper: Szegedy et al. 2016, Rethinking the inception architecture for computer vision, section 7,
    https://arxiv.org/abs/1512.00567
Equation: mean over answers of (1 − ε) (−log p_y) + ε · 1/V Σ_v (−log p_v), with ε = smoothing
Changes: loss
Cost: one mean over the logits.
Use when: answers may be wrong or ambiguous, or training drives the model to be too sure of itself;
    no old data is needed.
Not when: probabilities are read off the model's answers and shall be those of the data, or what was
    learned is distilled afterwards (Müller et al. 2019, https://arxiv.org/abs/1906.02629).
Differs from the paper: it is added as ε (z_y − 1/V Σ_v z_v), z the logits, which is the difference
    from the trainer's own loss; its setting label_smoothing_factor is to be left at 0.
Status: contract tested
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from keeptune.method import Batch, Context, Method, State
from keeptune.methods._distil import Sums


def lead(logits: Tensor, labels: Tensor) -> Tensor:
    """The target's logit less the mean of all: [N, V] and [N] to [N].

    It equals 1/V Σ_v (−log p_v) − (−log p_y): the normaliser is in both and drops out.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    target = logits.gather(-1, labels[:, None])[:, 0].to(wide)
    return target - logits.mean(-1, dtype=wide)


class LabelSmoothing(Method):
    """Train towards targets that leave every answer a small probability."""

    smoothing: float = Field(0.1, ge=0, lt=1, description="share of a target given to all; ε")

    neutral: ClassVar[dict[str, Any]] = {"smoothing": 0.0}
    proof: ClassVar[str] = "answers_smoothed"
    active_from: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    _sums: Sums = PrivateAttr(default_factory=lambda: Sums(2))

    def begin_task(self, ctx: Context) -> None:
        """Count anew."""
        self._sums = Sums(2, ctx.device)

    def loss(self, ctx: Context, batch: Batch, outputs: Any) -> Tensor | None:
        """What smoothing adds to the trainer's own loss of one micro batch."""
        if not self.smoothing:
            return None
        leads = lead(ctx.answer_logits(outputs.logits, batch), ctx.answer_labels(batch))
        self._sums.add(0, leads.detach().sum())
        self._sums.add(1, leads.numel())
        return self.smoothing * ctx.mean_over_answers(leads)

    def end_task(self, ctx: Context) -> None:
        """Add up what the processes counted."""
        self._sums.total()

    def evidence(self) -> dict[str, Any]:
        """Answers trained on, and by how much their logits lead the mean logit, in nats."""
        total, answers = self._sums.values()
        return {"answers_smoothed": int(answers), "lead": total / max(answers, 1)}

    def state(self) -> State:
        """What was counted."""
        return State({"sums": self._sums.total()})

    def restore(self, ctx: Context, state: State) -> None:
        """Go on counting."""
        self._sums = Sums.of(state.tensors["sums"], ctx.device)

    def declared_bytes(self, ctx: Context) -> int:
        """Two numbers."""
        return self._sums.nbytes
