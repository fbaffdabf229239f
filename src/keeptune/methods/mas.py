"""Memory aware synapses: hold back the weights to which the model's answers are most sensitive.

Paper: Aljundi et al. 2018, Memory aware synapses: learning what (not) to forget,
    https://arxiv.org/abs/1711.09601
Equation: L(w) + strength/2 Σ_i Ω_i (w_i − w*_i)²; Ω_i = Σ over tasks of the mean over examples of
    |∂ ‖f(x; w)‖² / ∂w_i|, f the logits, w* the weights at the last task's end
Changes: gradients or after_step, end_task
Cost: 2 floats per trained weight (on: effective: per adapted weight) for any number of tasks, 5/4
    with precision uint8; about one forward and backward per example, for at most `examples`
    examples, when a task ends.
Use when: as ewc, but the answers in the data are few, wrong or not to be used: it looks only at
    what the model says. On language models labels tell where an answer stands, not what it is.
Not when: old rows may be kept (replay keeps more), or classes of different tasks must be told
    apart.
Differs from the paper: strength/2, so the paper's λ is strength / 2. On a language model f is the
    logits at the answer's positions (with `top_k`, the largest of each), and their squares are
    summed over the positions.
Status: contract tested
"""

from __future__ import annotations

import torch
from pydantic import Field

from keeptune.method import Context
from keeptune.methods._anchor import Examined
from keeptune.methods._anchor.examples import example_sums
from keeptune.methods._anchor.objectives import squared_norm


class MAS(Examined):
    """A quadratic pull towards the weights after earlier tasks, by what the answers hang on."""

    top_k: int | None = Field(
        None, ge=1, description="only the largest logits of each answer count; default: all"
    )

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        """Add the task's importance, and anchor the weights where they are."""
        if self.strength == 0:
            return
        weights = self._weights(ctx)
        rows = self._rows(ctx, "mas")
        objective = squared_norm(self.top_k)
        sums, how = example_sums(ctx, weights.parameters, rows, objective, "absolute")
        for name in weights.names():
            importance = sums.pop(name).div_(len(rows))
            self._keep_importance(name, self._importance_of(weights, name).add_(importance))
            self._keep_anchor(weights, name)
        self._evidence |= {"importance_rows": len(rows), "importance_by": how}
        self._evidence |= {"extra_forward_rows": len(rows), "extra_backward_rows": len(rows)}
        self._show_importance(weights)
