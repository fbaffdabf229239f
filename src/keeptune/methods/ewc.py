"""Elastic weight consolidation: hold back the weights that mattered to earlier tasks.

Paper: Kirkpatrick et al. 2017, Overcoming catastrophic forgetting in neural networks,
    https://arxiv.org/abs/1612.00796; online form: Schwarz et al. 2018, Progress & Compress,
    https://arxiv.org/abs/1805.06370
Equation: L(w) + strength/2 Σ_k Σ_i F_ki (w_i − w*_ki)²; F_ki = mean over the examples of task k of
    (∂ log p(answer | prompt) / ∂w_i)² at w*_k. Online: L(w) + strength/2 Σ_i F_i (w_i − w*_i)²
    with w* the weights at the last task's end and F ← decay · F + F_k
Changes: gradients or after_step, end_task
Cost: 2 floats per trained weight (on: effective: per adapted weight) for any number of tasks, 5/4
    with precision uint8; about one forward and backward per example, for at most `examples`
    examples, when a task ends.
Use when: old data must not be stored, tasks are related, and one model must serve all of them.
Not when: old rows may be kept (replay keeps more), classes of different tasks must be told apart,
    or the knowledge to keep is the base model's own, for which there is no task to take a Fisher
    from. Never take fisher: batched but to compare: opposite gradients cancel in it, and its scale
    changes with the batch size, so no strength means anything.
Differs from the paper: the sum of all tasks' quadratic terms is kept as one exactly equal term
    (F = Σ F_k, w* = Σ F_k w*_k / F). For a language model the per-example gradient is that of the
    summed log-probability of the answer's tokens, one example at a time. The penalty is inside
    gradient clipping. Progress & Compress multiplies F by decay in the penalty too, and does not
    say how it normalises F_k: here to a mean of 1. From the third task on the separate form counts
    old tasks more than once (Huszár 2018, https://arxiv.org/abs/1712.03847); online with decay 1
    and normalise false does not.
Status: contract tested
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from keeptune.errors import MethodError
from keeptune.method import OPTIONS, Context
from keeptune.methods._anchor import Examined, Weights
from keeptune.methods._anchor.examples import (
    batched_sums,
    choice_sums,
    example_sums,
    sign_sums,
)
from keeptune.methods._anchor.objectives import all_labels, log_likelihood, sampled

Estimator = Literal["empirical", "sampled", "exact", "signs", "batched"]


def fisher_diagonal(
    ctx: Context, weights: dict[str, nn.Parameter], rows: Sequence[int], estimator: Estimator
) -> tuple[dict[str, Tensor], str]:
    """Mean over examples of the squared gradient of the answer's log-probability.

    Args:
        ctx: The task that ended.
        weights: By name.
        rows: Which rows of its data set.
        estimator: "empirical" takes the true answers; "sampled" draws answers from the model;
            "exact" goes through all classes or choices, each by its probability; "signs" estimates
            the empirical one without bias by random signs; "batched" squares the mean gradients of
            batches of 64, which is no Fisher (van de Ven 2025, https://arxiv.org/abs/2502.11756).

    Returns:
        F by name, each of the weight's shape, in nats² per unit²; and how it was computed.

    Raises:
        MethodError: "exact" where answers cannot be enumerated.
    """
    how: str = estimator
    if estimator == "signs":
        sums = sign_sums(ctx, weights, rows, log_likelihood)
    elif estimator == "batched":
        sums = batched_sums(ctx, weights, rows, log_likelihood, batch=64)
    elif estimator == "exact" and OPTIONS in ctx.dataset.column_names:
        sums, how = choice_sums(ctx, weights, rows)
    else:
        objectives = {"empirical": log_likelihood, "sampled": sampled(ctx), "exact": all_labels}
        sums, how = example_sums(ctx, weights, rows, objectives[estimator], "square")
    for total in sums.values():
        total /= len(rows)
    return sums, how


def consolidate(anchor: Tensor, total: Tensor, weight: Tensor, fisher: Tensor) -> None:
    """Add one quadratic term to a running one, in place and exactly.

    Σ_k F_k (w − w_k)² = F (w − a)² + const with F = Σ F_k and a = Σ F_k w_k / F, so
    a ← a + F_new / (F + F_new) · (w_new − a). Where F stays 0 the anchor does not matter.

    Args:
        anchor: a, changed.
        total: F, changed.
        weight: w_new, the weights at the end of the new task.
        fisher: F_new.
    """
    total.add_(fisher)
    share = torch.where(total > 0, fisher / total.clamp_min(torch.finfo(total.dtype).tiny), 1.0)
    anchor.add_(share * (weight - anchor))


class EWC(Examined):
    """A quadratic pull towards the weights after earlier tasks, by importance."""

    fisher: Estimator = Field("empirical", description="how the Fisher is estimated, see the card")
    form: Literal["separate", "online"] = Field(
        "separate", description="a term for each task, or one running term"
    )
    decay: float = Field(1.0, ge=0, le=1, description="γ: what the online form keeps of the old F")
    normalise: bool | None = Field(
        None, description="scale each F_k to a mean of 1; default: only in the online form"
    )

    @model_validator(mode="after")
    def _one_form(self) -> EWC:
        if self.decay != 1 and self.form == "separate":
            raise MethodError(
                f"EWC.decay: the separate form keeps every task's term whole, got {self.decay}. "
                "Set `form: online`, or leave decay out."
            )
        return self

    def _needs_every_answer(self) -> bool:
        return self.fisher == "exact"

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        """Take the task's Fisher and fold it into the running term."""
        if self.strength == 0:
            return
        weights = self._weights(ctx)
        rows = self._rows(ctx, "fisher")
        fisher, how = fisher_diagonal(ctx, weights.parameters, rows, self.fisher)
        if self.form == "online" if self.normalise is None else self.normalise:
            mean = self._mean(weights, fisher)
            for one in fisher.values():
                one /= mean
        for name in weights.names():
            self._fold(weights, name, fisher.pop(name))
        self._evidence |= {"fisher_rows": len(rows), "fisher_by": how}
        self._evidence["extra_forward_rows"] = len(rows)
        if self.fisher != "exact":  # which goes backward once for every answer there is
            self._evidence["extra_backward_rows"] = len(rows)
        self._show_importance(weights)

    def _fold(self, weights: Weights, name: str, fisher: Tensor) -> None:
        """Add one weight's Fisher to what is kept of it."""
        total = self._importance_of(weights, name)
        if self.form == "online":
            total.mul_(self.decay).add_(fisher)
            self._keep_anchor(weights, name)
        elif name not in self._anchor:
            total.add_(fisher)
            self._keep_anchor(weights, name)
        else:
            value = weights.shaped(name, weights.value(name))
            anchor = self._anchor[name].full(value.device).clone()
            consolidate(anchor, total, value, fisher)
            self._anchor[name].replace(anchor)
        self._keep_importance(name, total)
