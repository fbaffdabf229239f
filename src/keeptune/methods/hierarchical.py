"""Hierarchical regularisation: keep general ability by importance of weights and of layers.

Paper: Song et al. 2025, How to alleviate catastrophic forgetting in LLMs finetuning? Hierarchical
    layer-wise and element-wise regularization, https://arxiv.org/abs/2501.13669
Equation: L(w) + strength/2 Σ_l α_l Σ_i Ω_li (w_li − w*_li)²; Ω_li = max(0, −Σ_steps g_li Δw_li) /
    (d_li² + damping) over the general task, α_l = softmax over layers of ‖Ω_l‖ / (temperature ·
    largest norm), w* the weights at the general task's end
Changes: begin_task, gradients, after_step, end_task
Cost: 3 floats per held weight while the general task is learned (anchor, path, a copy of the
    gradient between backward and step), 2 after it; no extra forward or backward pass. Under LoRA
    a float is held for each weight of the adapted matrices, not of the factors, and each batch of
    the general task costs one more product for each of these matrices.
Use when: general data are to be had, and general ability must outlive the tasks after it.
Not when: there are no such data, or each new task must be kept as well (si adds up all tasks).
Differs from the paper: the general data are the first task of the stream, since a model learns
    them like any other; all later tasks are held. Softmax of the bare norms gives one layer
    everything, and of norms over their mean still 85 % on SmolLM2; so they are divided by the
    largest, and no α is more than e^(1/temperature) times another. Every weight
    tensor counts as a layer. The sum of α is 1, so a number as strength weakens with their count.
    The path is that of the real optimizer, not of SGD. The paper's λ is strength / 2.
Status: contract tested
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from keeptune.method import Context
from keeptune.methods._anchor import ON, Travelled, Weights, sum_of_squares


def layer_weights(norms: Tensor, temperature: float) -> Tensor:
    """α_l = softmax over layers of ‖Ω_l‖ / (temperature · largest norm).

    Song et al. 2025 take the softmax of the norms themselves, which saturates: with norms of 1 and
    100 the second layer gets everything, and with 1e-6 and 1e-4 both get the same. Here no layer
    weighs more than e^(1/temperature) times another.

    Args:
        norms: [layers], at least 0.
        temperature: Above 0; large makes all layers alike.

    Returns:
        [layers], their sum is 1.
    """
    largest = norms.max()
    return torch.softmax(norms / (temperature * largest) if largest > 0 else norms, 0)


class Hierarchical(Travelled):
    """A quadratic pull towards the weights after the general task, by weight and by layer."""

    on: Literal["factors", "effective"] = Field("effective", description=ON)
    temperature: float = Field(1.0, gt=0, description="of the softmax over layers")

    def _is_recording(self, ctx: Context) -> bool:
        return ctx.index == 0 and super()._is_recording(ctx)

    def _add_importances(self, weights: Weights, importances: dict[str, Tensor]) -> None:
        """Weigh each layer."""
        squares = torch.stack([sum_of_squares(importances[name]) for name in weights.names()])
        norms = torch.tensor(self._over_shards(weights, squares), dtype=torch.float64).sqrt()
        alpha = layer_weights(norms, self.temperature).tolist()
        for name, share in zip(weights.names(), alpha, strict=True):
            self._keep_importance(name, importances.pop(name).mul_(share))
        self._evidence |= {"largest_layer_weight": max(alpha), "layers": len(alpha)}
