"""Bottleneck adapters: a small module for each task behind every layer's feed-forward part.

Paper: Houlsby et al. 2019, Parameter-efficient transfer learning for NLP,
    https://arxiv.org/abs/1902.00751 ; placed as in Pfeiffer et al. 2020, AdapterFusion,
    https://arxiv.org/abs/2005.00247
Equation: m_i ← m_i + B_i^t max(A_i^t m_i + a_i^t, 0) + b_i^t for task t, with m_i what the
    feed-forward part of layer i gives; of an unknown task: the mean over t of what is added
Changes: begin_task, end_task, serve
Cost: for each layer 2 · rank · D + rank + D weights a task, D the hidden size; one task's are
    passed when it is known, else all. A step needs no gradients of the model's own weights.
Use when: the task is known when the model answers, and its answers must never change by one bit.
Not when: tasks should help each other; a new classifier's head is to be learned, which stays
    frozen with the rest; or the result must be a plain model, for which there is `task_lora`.
Differs from the paper: one bottleneck a layer, not two, as Pfeiffer et al. found as good; layer
    norms stay frozen, so that the model is the same for all tasks. The way back is 0 at first, in
    place of nearly 0, so that training starts from the model itself. Neither paper has unknown
    tasks but by learning to fuse, which needs data of all tasks at once. Trains no other adapter.
Status: contract tested
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from keeptune.method import Context
from keeptune.methods._isolate import layers
from keeptune.methods._isolate.bottlenecks import Bottleneck, Bottlenecks
from keeptune.methods._isolate.grown import Grown, Parts


class Adapters(Grown):
    """Train one new bottleneck for each layer; the model and all earlier ones stay."""

    rank: int = Field(16, ge=1, description="size of each bottleneck")

    proof: ClassVar[str] = "way_back"

    def _attached(self, ctx: Context) -> Parts:
        _, stack = layers(ctx.model, self.name())
        found = Bottlenecks()
        found.behind(stack)
        return found.attach(ctx.model)

    def _part(self, ctx: Context) -> Bottleneck:
        _, stack = layers(ctx.model, self.name())
        config: Any = ctx.model.config
        return Bottleneck(len(stack), config.get_text_config().hidden_size, self.rank)

    def _answering(self, number: int | None) -> list[int]:
        return list(range(len(self._numbers))) if number is None else [number]

    def end_task(self, ctx: Context) -> None:
        """Show what the bottlenecks cost."""
        parts, every = self._parts(ctx), sum(p.numel() for p in ctx.model.parameters())
        own, total = list(parts)[-1], sum(p.numel() for p in parts.parameters())
        self._evidence.update(
            adapters=len(self._numbers),
            way_back=float(own.up.detach().norm()),
            parameters=sum(p.numel() for p in own.parameters()),
            parameters_of_all=total,
            # A token meets each weight once, as it does those of the model.
            cost_share=total / len(self._numbers) / (every - total),
        )
