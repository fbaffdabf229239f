"""Half fine-tuning: each task trains another random half of the model.

Paper: Hui et al. 2024, HFT: half fine-tuning for large language models,
    https://arxiv.org/abs/2404.18466
Equation: in each layer and category (attention, feed-forward, norms) a random `share` of the
    matrices or norms stays: w ← w for these, drawn anew for each task
Changes: begin_task, end_task
Cost: less than plain: no gradients of weights and no optimizer state for `share` of the layers.
Use when: no old data may be kept and all weights are trained; it costs nothing.
Not when: one task must be learned as fully as possible, or adapters are already small: half of
    their rank does the same.
Differs from the paper: the same. Where a category has an odd number of parts (gate, up, down), the
    numbers frozen alternate from layer to layer so that the total is `share`. Embeddings, head and
    last norm are trained, as there. Under LoRA a part is frozen with both factors of its adapter.
Status: contract tested
"""

from __future__ import annotations

from collections import defaultdict
from math import floor
from typing import Any, ClassVar

from pydantic import Field, PrivateAttr

from keeptune.method import Context, Method
from keeptune.methods._anchor.shards import refuse_shards
from keeptune.methods._isolate import SETTLED, freeze, give_free, layers, size, units


class Half(Method):
    """Freeze a random half of every category for the length of a task."""

    share: float = Field(0.5, ge=0, lt=1, description="share of each category that is frozen")

    neutral: ClassVar[dict[str, Any]] = {"share": 0.0}
    proof: ClassVar[str] = "frozen_share"
    active_from: ClassVar[int] = 0
    traits: ClassVar[frozenset[str]] = frozenset({"freeze"})
    # Weights that isolation counts as this task's must be the same in each task.
    excludes: ClassVar[frozenset[str]] = frozenset({"isolation"})

    _frozen: list[str] = PrivateAttr(default_factory=list)

    def begin_task(self, ctx: Context) -> None:
        """Draw what is frozen, from the seed and the task alone.

        Raises:
            MethodError: The model has no layers, or its weights are sharded.
        """
        if not self.share:
            return
        refuse_shards(ctx, self.name(), SETTLED)
        before = size(ctx, list(ctx.trainable()))
        starts = tuple(self._drawn(ctx))
        names = [n for n, _ in ctx.model.named_parameters() if starts and n.startswith(starts)]
        self._frozen = freeze(ctx, names, self.name())
        frozen = size(ctx, self._frozen)
        self._evidence.update(
            parts=len(starts), frozen=frozen, trained=before - frozen, frozen_share=frozen / before
        )

    def _drawn(self, ctx: Context) -> list[str]:
        """How the names of the frozen weights start."""
        stack, blocks = layers(ctx.model, self.name())
        random, drawn = ctx.random("half"), []
        offsets: dict[str, float] = defaultdict(random.random)
        for index in range(len(blocks)):
            parts: dict[str, list[str]] = defaultdict(list)
            for category, start in units(blocks, index):
                parts[category].append(f"{stack}.{index}.{start}")
            for category, starts in parts.items():
                at, each = offsets[category], len(starts) * self.share
                count = floor(at + (index + 1) * each) - floor(at + index * each)
                drawn += [starts[i] for i in random.permutation(len(starts))[:count]]
        return drawn

    def end_task(self, ctx: Context) -> None:
        """Train again what was trained before."""
        give_free(ctx, self._frozen)
        self._frozen = []
