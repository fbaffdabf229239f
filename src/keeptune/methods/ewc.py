"""Elastic weight consolidation: hold back the weights that mattered to earlier tasks.

Paper: Kirkpatrick et al. 2017, Overcoming catastrophic forgetting in neural networks,
    https://arxiv.org/abs/1612.00796
Equation: L(w) + strength/2 Σ_k Σ_i F_ki (w_i − w*_ki)²; F_ki = mean over the examples of task k of
    (∂ log p(answer | prompt) / ∂w_i)² at w*_k
Changes: gradients, end_task
Cost: 2 floats per trained weight for any number of tasks; one forward and backward per example,
    for at most `examples` examples, when a task ends.
Use when: old data must not be stored, tasks are related, and one model must serve all of them.
Not when: old rows may be kept (replay keeps more), or the knowledge to keep is the base model's
    own, for which there is no task to take a Fisher from.
Differs from the paper: the sum of all tasks' quadratic terms is kept as one exactly equal term
    (F = Σ F_k, w* = Σ F_k w*_k / F). The gradient is that of the summed log-probability of the
    answer's tokens, one example at a time, so it does not depend on any batch size. The penalty is
    inside gradient clipping.
Status: contract tested
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from keeptune.method import Context, Method, State


def empirical_fisher(ctx: Context, examples: int) -> tuple[dict[str, Tensor], int]:
    """Mean over examples of the squared gradient of the answer's log-probability.

    The empirical Fisher's diagonal (Kirkpatrick et al. 2017, with the true labels): per example,
    squared, then averaged; the model is in eval mode and its gradients are left empty.

    Args:
        ctx: The task that ended.
        examples: At most so many rows are used, drawn without repeats.

    Returns:
        F by parameter name, each of the parameter's shape, in nats² per unit²; rows used.
    """
    parameters = ctx.trainable()
    fisher = {n: torch.zeros_like(p) for n, p in parameters.items()}
    rows = ctx.random("fisher").permutation(len(ctx.dataset))[:examples]
    was_training = ctx.model.training
    ctx.model.eval()
    for row in rows:
        log_p = ctx.log_likelihood(ctx.batch([ctx.dataset[int(row)]])).sum()
        gradients = torch.autograd.grad(log_p, list(parameters.values()), allow_unused=True)
        for f, g in zip(fisher.values(), gradients, strict=True):
            if g is not None:
                f.addcmul_(g, g, value=1 / len(rows))
    ctx.model.train(was_training)
    return fisher, len(rows)


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


def is_measured(step: int) -> bool:
    """Whether evidence is measured at this step: powers of two, and every 64th."""
    return step > 0 and (step & (step - 1) == 0 or step % 64 == 0)


class EWC(Method):
    """A quadratic pull towards the weights after earlier tasks, by importance."""

    strength: float = Field(100.0, ge=0, description="weight of the penalty; the paper's λ")
    examples: int = Field(256, ge=1, description="rows per task for the Fisher, at most")

    neutral: ClassVar[dict[str, Any]] = {"strength": 0.0}
    proof: ClassVar[str] = "gradient_share"
    traits: ClassVar[frozenset[str]] = frozenset({"anchor"})
    excludes: ClassVar[frozenset[str]] = frozenset({"structure", "restart"})

    _anchor: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _fisher: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    @torch.no_grad()
    def gradients(self, ctx: Context) -> None:
        """Add strength · F (w − w*) to each gradient."""
        if not self._anchor or not self.strength:
            return
        measured = is_measured(ctx.step)
        squares = torch.zeros(3, device=ctx.device)
        for name, parameter in ctx.trainable().items():
            pull = (parameter - self._anchor[name]).mul_(self._fisher[name])
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if measured:
                squares[0] += (pull * (parameter - self._anchor[name])).sum()
                squares[1] += pull.square().sum()
                squares[2] += parameter.grad.square().sum()
            parameter.grad.add_(pull, alpha=self.strength * ctx.grad_scale)
        if measured:
            self._measure(squares, ctx)

    def _measure(self, squares: Tensor, ctx: Context) -> None:
        distance, pull, task = squares.tolist()
        pull = self.strength * pull**0.5
        task = task**0.5 / ctx.grad_scale
        self._evidence["penalty"] = 0.5 * self.strength * distance
        share = pull / (pull + task) if pull + task else 0.0
        self._evidence["gradient_share"] = max(share, self._evidence.get("gradient_share", 0.0))

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        """Take the task's Fisher and fold it into the running term."""
        if not self.strength:
            return
        with torch.enable_grad():
            fisher, rows = empirical_fisher(ctx, self.examples)
        for name, parameter in ctx.trainable().items():
            if name not in self._anchor:
                self._anchor[name] = parameter.detach().clone()
                self._fisher[name] = fisher[name]
            else:
                consolidate(self._anchor[name], self._fisher[name], parameter, fisher[name])
        self._evidence["fisher_rows"] = rows
        self._evidence["extra_forward_rows"] = self._evidence["extra_backward_rows"] = rows
        # In name order: a restored state has another order, and sums would round otherwise.
        self._evidence["fisher_sum"] = sum(
            self._fisher[name].sum().item() for name in sorted(self._fisher)
        )

    def state(self) -> State:
        """The one anchor and the one Fisher."""
        tensors = {f"anchor/{n}": t for n, t in self._anchor.items()}
        return State(tensors | {f"fisher/{n}": t for n, t in self._fisher.items()})

    def restore(self, ctx: Context, state: State) -> None:
        """Take anchor and Fisher back."""
        for kind, store in (("anchor/", self._anchor), ("fisher/", self._fisher)):
            store.clear()
            for name, tensor in state.tensors.items():
                if name.startswith(kind):
                    store[name.removeprefix(kind)] = tensor.to(ctx.device)

    def declared_bytes(self, ctx: Context) -> int:
        """Two floats per trained weight once a task has ended."""
        weights = sum(p.numel() * p.element_size() for p in ctx.trainable().values())
        return 2 * weights if self._anchor else 0
