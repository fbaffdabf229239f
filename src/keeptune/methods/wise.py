"""WiSE-FT: after each task, go back part of the way to the weights before it.

Paper: Wortsman et al. 2022, Robust fine-tuning of zero-shot models,
    https://arxiv.org/abs/2109.01903
Equation: w ← (1 − mix) w_before + mix w_after
Changes: begin_task, end_task
Cost: one copy of the trained weights (adapters only, under LoRA); no time per step.
Use when: you want the simplest protection of general knowledge, with or without any old data.
Not when: tasks are facts to be memorised: the weights half-way often hold neither well.
Differs from the paper: applied after every task of a stream, with the weights before that task as
    the other end. Under LoRA the effective update ΔW = scale · B A is interpolated, then cut to the
    adapter's rank by SVD; the error of the cut is in the evidence.
Status: contract tested
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from keeptune.method import Context, Method, State


def mix_factors(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], mix: float
) -> tuple[Tensor, Tensor, float]:
    """The best rank-r factors of (1 − mix) B₀A₀ + mix B₁A₁.

    QR of the stacked factors, then an SVD of a 2r × 2r matrix (Eckart–Young).

    Args:
        old: A₀ [r, in] and B₀ [out, r].
        new: A₁ and B₁.
        mix: Share of the new update, 0 to 1.

    Returns:
        A [r, in], B [out, r], and the relative Frobenius error of the cut to rank r.
    """
    (a0, b0), (a1, b1) = old, new
    rank = a0.shape[0]
    left, left_r = torch.linalg.qr(torch.cat([(1 - mix) * b0, mix * b1], 1).double())
    right, right_r = torch.linalg.qr(torch.cat([a0, a1], 0).double().T)
    u, s, vh = torch.linalg.svd(left_r @ right_r.T)
    root = s[:rank].sqrt()
    b = (left @ u[:, :rank]) * root
    a = root[:, None] * (vh[:rank] @ right.T)
    total = s.square().sum()
    error = float((s[rank:].square().sum() / total).sqrt()) if total > 0 else 0.0
    return a.to(a0.dtype), b.to(b0.dtype), error


class WiSE(Method):
    """Interpolate the weights before and after each task."""

    mix: float = Field(0.5, ge=0, le=1, description="share of the new weights")

    neutral: ClassVar[dict[str, Any]] = {"mix": 1.0}
    proof: ClassVar[str] = "moved_back"
    active_from: ClassVar[int] = 0
    excludes: ClassVar[frozenset[str]] = frozenset({"structure", "restart"})

    _before: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    def begin_task(self, ctx: Context) -> None:
        """Keep the weights before the task."""
        if self.mix < 1:
            self._before = {n: p.detach().clone() for n, p in ctx.trainable().items()}

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        """Set the weights between those before and those after."""
        if self.mix == 1:
            return
        weights = ctx.trainable()
        squares, worst = 0.0, 0.0
        for name in list(weights):
            partner = name.replace(".lora_A.", ".lora_B.")
            if partner != name and partner in weights:
                pair = [(weights[n], self._before[n]) for n in (name, partner)]
                (a, a_old), (b, b_old) = pair
                new_a, new_b, error = mix_factors((a_old, b_old), (a, b), self.mix)
                squares += float((new_a - a).square().sum() + (new_b - b).square().sum())
                a.copy_(new_a)
                b.copy_(new_b)
                worst = max(worst, error)
            elif ".lora_B." not in name:
                step = (1 - self.mix) * (self._before[name] - weights[name])
                squares += float(step.square().sum())
                weights[name].add_(step)
        self._evidence.update(moved_back=squares**0.5, worst_cut_error=worst)
        self._before.clear()

    def state(self) -> State:
        """The weights before the present task."""
        return State({f"before/{n}": t for n, t in self._before.items()})

    def restore(self, ctx: Context, state: State) -> None:
        """Take the weights before the present task back."""
        self._before = {
            n.removeprefix("before/"): t.to(ctx.device) for n, t in state.tensors.items()
        }

    def declared_bytes(self, ctx: Context) -> int:
        """One copy of the trained weights during a task, nothing between tasks."""
        weights = sum(p.numel() * p.element_size() for p in ctx.trainable().values())
        return weights if self._before else 0
