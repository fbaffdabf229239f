"""Gradient episodic memory: a step may raise the loss on the old rows of no earlier task.

Paper: Lopez-Paz & Ranzato 2017, Gradient episodic memory for continual learning,
    https://arxiv.org/abs/1706.08840
Equation: where some g·r_k < 0: g ← g + Σ_k v_k r_k, v = argmin ½ vᵀRRᵀv + (Rg)ᵀv, v_k ≥ margin,
    with g the step's gradient and r_k, the rows of R, that of the mean loss over a few rows
    drawn from earlier task k. At margin 0 this is the nearest gradient with g·r_k ≥ 0 for every k
Changes: gradients, end_task
Cost: `size` kept rows for each earlier task; at each step one forward and backward over `rows`
    rows of each, and as many gradients' memory meanwhile. Both grow with the number of tasks.
Use when: as agem, with few tasks, when none of them may be given up for the others.
Not when: tasks are many or the model is large and all its weights are trained: agem costs the same
    for any number of tasks.
Differs from the paper: a reference is a draw from the kept rows, not all of them; these are a
    reservoir of the task, not its last rows. The program is solved exactly instead of with 0.001
    added to RRᵀ, which would depend on the size of the loss. The margin is a lower bound of v, as
    in the authors' code.
Status: contract tested
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from keeptune.methods._reference import Referenced


def nonnegative_minimum(p: Tensor, q: Tensor) -> Tensor:
    """The u ≥ 0 at which ½ uᵀPu + qᵀu is least, by active sets (Lawson and Hanson 1974, ch. 23).

    Args:
        p: P [k, k] in float64, symmetric, no eigenvalue below 0.
        q: q [k] in float64.
    """
    size = p.diagonal().sqrt()
    size = size.where(size > 0, 1.0)
    # Unit diagonal, so that one tolerance fits all; the ridge parts references that are equal.
    p = p / size.outer(size) + 1e-10 * torch.eye(len(q), dtype=p.dtype)
    q = q / size
    u = torch.zeros_like(q)
    free = torch.zeros(len(q), dtype=torch.bool)
    # Each round lowers the objective, so none comes back; the bound is for rounding at a tie.
    for _ in range(10 * len(q)):
        gain = -(p @ u + q).masked_fill(free, torch.inf)
        if gain.max() <= 1e-12 * q.abs().max():
            break
        free[gain.argmax()] = True
        while not ((target := _minimum(p, q, free)) > 0)[free].all():
            # As far as all stay at 0 or above; the first that would not is held at 0.
            out = free & (target <= 0)
            ways = torch.where(out, u / (u - target).where(out & (u > target), 1.0), torch.inf)
            u = u + ways.min() * (target - u)
            free[ways.argmin()] = False
            u[~free] = 0
        u = target
    return u / size


def _minimum(p: Tensor, q: Tensor, free: Tensor) -> Tensor:
    """Where the objective is least when only the free ones may differ from 0."""
    found = torch.zeros_like(q)
    found[free] = torch.linalg.solve(p[free][:, free], -q[free])
    return found


def shares_to_add(products: Tensor, margin: float) -> Tensor:
    """What of each reference is added to the gradient: v [k], 0 where nothing is in conflict.

    Args:
        products: [1 + k, 1 + k] in float64, inner products of the gradient and the references;
            when they are not finite, nothing of the result is, so that fp16 leaves the step out.
        margin: The least share of each reference in a conflict, 0 or above.
    """
    if not products.isfinite().all():
        return torch.full((len(products) - 1,), torch.nan)
    dots, square = products[0, 1:], products[1:, 1:]
    if (dots >= 0).all():
        return torch.zeros_like(dots)
    return margin + nonnegative_minimum(square, dots + margin * square.sum(1))


class GEM(Referenced):
    """Project the gradient where it points against the gradient on any earlier task's rows."""

    size: int = Field(500, ge=1, description="rows kept of each earlier task")
    margin: float = Field(
        0.5, ge=0, description="least share of each old gradient added in a conflict; γ"
    )

    def _buffer_of(self, task: str) -> str:
        return task

    def _weights_of(self, products: Tensor) -> list[float]:
        return [float(share) for share in shares_to_add(products, self.margin)]
