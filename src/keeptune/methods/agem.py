"""Averaged gradient episodic memory: a step may not raise the loss on old rows, on average.

Paper: Chaudhry et al. 2019, Efficient lifelong learning with A-GEM,
    https://arxiv.org/abs/1812.00420
Equation: g ← g − (g·r / r·r) r where g·r < 0, with g the step's gradient and r that of the mean
    loss over a few rows drawn from a reservoir of D_1 … D_{t-1}
Changes: gradients, end_task
Cost: at most `size` kept rows; one forward and backward over `rows` rows at each step, and one
    gradient's memory meanwhile.
Use when: old training rows may be kept, and the new task shall be learned as it is wherever it
    does not disturb the old ones.
Not when: the same rows can be trained on: replay usually keeps more for the same time, since a
    projection only stops the old loss from rising and never lowers it.
Differs from the paper: any number of rows may be kept; a reservoir chosen when a task ends, not a
    share for each task. Several epochs are allowed.
Status: contract tested
"""

from __future__ import annotations

from torch import Tensor

from keeptune.methods._reference import Referenced


def share_to_add(dot: float, square: float) -> float:
    """What of the reference r is added to the gradient g: −g·r / r·r where g·r < 0, else 0.

    Args:
        dot: g·r; when it is not a number, neither is the result, so that fp16 leaves the step out.
        square: r·r.
    """
    return 0.0 if dot >= 0 else -dot / square


class AGEM(Referenced):
    """Project the gradient where it points against the mean gradient on old rows."""

    def _buffer_of(self, task: str) -> str:
        return "earlier tasks"

    def _weights_of(self, products: Tensor) -> list[float]:
        return [share_to_add(products[0, 1].item(), products[1, 1].item())]
