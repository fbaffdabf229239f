"""A LoRA adapter per task, kept orthogonal to the input directions of all earlier ones; one model.

Paper: Wang et al. 2023, Orthogonal subspace learning for language model continual learning,
    https://arxiv.org/abs/2310.14152
Equation: L(A_t, B_t) + strength · Σ_{i<t} Σ_jk |(A_i A_tᵀ)_jk| + norm_strength · (‖A_t‖ + ‖B_t‖),
    summed over the adapted matrices, with W = W_0 + Σ_{i≤t} scale · B_i A_i
Changes: begin_task, gradients, end_task
Cost: as inc_lora, one adapter more with each task in memory and in every step; the terms
    themselves, in closed form, about 0.003 of a LoRA step for one earlier adapter.
Use when: no old data may be kept, tasks differ, and the task is not known when the model answers.
Not when: tasks are many or alike: what is kept free for old ones is lost to new ones, and the
    paper's own logs show that new tasks are learned less well.
Differs from the paper: the terms' gradient is added in closed form, once for each step whatever the
    number of micro batches; the authors' code adds the term to each micro batch, so that
    `strength` grows with their number. Strengths are the same in all tasks, where the paper's
    long streams have some tuned for single tasks. Frozen adapters see no dropout. A classifier's
    head is trained in all tasks and not frozen. At strength 0 it is inc_lora.
Status: contract tested
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from keeptune.method import Context
from keeptune.methods._adapters import FIRST, factors
from keeptune.methods._stack import Stacked


def overlap(old: Tensor, new: Tensor) -> Tensor:
    """Σ |A_old A_newᵀ| of the rows of all earlier A [R, in] with those of the new one [r, in]."""
    return (old @ new.T).abs().sum()


def overlap_gradient(old: Tensor, new: Tensor) -> Tensor:
    """The gradient of `overlap` by the new A, sign(A_old A_newᵀ)ᵀ A_old: [r, in]."""
    return (old @ new.T).sign().T @ old


class OLoRA(Stacked):
    """Stack a new adapter on the frozen ones with each task, orthogonal to them."""

    strength: float = Field(0.5, ge=0, description="weight of the overlap with earlier A; λ1")
    norm_strength: float = Field(0.0, ge=0, description="weight of the new factors' norms; λ2")

    proof: ClassVar[str] = "gradient_share"
    steered: ClassVar[str] = "strength"

    @torch.no_grad()
    def gradients(self, ctx: Context) -> None:
        """Add the gradients of both terms."""
        if not self._frozen:
            return
        pulls: list[tuple[nn.Parameter, Tensor]] = []
        for layer in self._layers():
            if FIRST in layer.lora_A:
                a = layer.lora_A[FIRST].weight
                old = torch.cat([layer.lora_A[name].weight.flatten(1) for name in self._frozen])
                gradient = overlap_gradient(old, a.flatten(1))
                gradient.mul_(self.strength * self._effort)
                pulls.append((a, gradient.view_as(a)))
        if self.norm_strength:
            for factor in factors(ctx.model, FIRST).values():
                # A norm has no gradient at 0, where B starts.
                scale = self.norm_strength / factor.norm().clamp_min(1e-30)
                pulls.append((factor, factor * scale))
        if not ctx.step & (ctx.step - 1):  # at steps that are powers of two
            self._show(ctx, pulls)
        for factor, pull in pulls:
            if factor.grad is not None:
                factor.grad.add_(pull, alpha=ctx.grad_scale)

    def _show(self, ctx: Context, pulls: list[tuple[nn.Parameter, Tensor]]) -> None:
        """Note the largest share of the terms in terms and task gradient, all as norms."""
        gradients = [p.grad for p in ctx.trainable().values() if p.grad is not None]
        task = float(nn.utils.get_total_norm(gradients)) / ctx.grad_scale
        own = float(nn.utils.get_total_norm([pull for _, pull in pulls]))
        share = own / (task + own) if own else 0.0
        shown = self._evidence
        shown["gradient_share"] = max(share, shown.get("gradient_share", 0.0))
