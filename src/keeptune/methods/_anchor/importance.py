"""The penalty by importance: what each method of the family fills with an Ω of its own."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from keeptune.method import Context, wide
from keeptune.methods._anchor.examples import require_answers
from keeptune.methods._anchor.kept import Precision
from keeptune.methods._anchor.penalty import Anchored
from keeptune.methods._anchor.weights import Effective, Weights

ON = "under LoRA: hold the factors A and B, or the update ΔW = s·BA; else both are the weights"


class Weighted(Anchored):
    """Holds each weight by its importance."""

    on: Literal["factors", "effective"] = Field("factors", description=ON)
    precision: Precision = Field("float32", description="of the importances at rest")

    def _weights(self, ctx: Context) -> Weights:
        return Effective(ctx) if self.on == "effective" else Weights(ctx)

    def _precision(self) -> Precision:
        return self.precision

    def _held(self, weights: Weights) -> list[str]:
        """An anchor alone holds nothing: what has no importance yet is free."""
        return [name for name in super()._held(weights) if name in self._importance]

    def _keep_importance(self, name: str, importance: Tensor) -> None:
        """Keep another importance, of the weight's shape."""
        self._keep(self._importance, name, importance, self.precision)

    def _importance_of(self, weights: Weights, name: str) -> Tensor:
        """The present importance in floats, for writing; zeros before the first task's end."""
        if name in self._importance:
            return self._importance[name].full(weights.owner(name).device).clone()
        return torch.zeros_like(wide(weights.shaped(name, weights.value(name))))

    def _mean(self, weights: Weights, importances: dict[str, Tensor]) -> float:
        """The mean of all importances; 1 if all are 0, so that one can divide by it."""
        sums = torch.zeros(2, dtype=torch.float64)
        for importance in importances.values():
            sums += torch.tensor([importance.sum(), importance.numel()], dtype=torch.float64)
        total, count = self._over_shards(weights, sums)
        return total / count if total else 1.0

    def _show_importance(self, weights: Weights) -> None:
        """Leave as evidence the sum of all importances and the bytes per weight at rest."""
        total, kept, count = torch.zeros(1, dtype=torch.float64), 0, 0
        for name in self._held(weights):
            importance = self._importance[name]
            total += importance.full(weights.owner(name).device).sum().cpu()
            kept += self._anchor[name].nbytes + importance.nbytes
            count += importance.numel
        (self._evidence["importance_sum"],) = self._over_shards(weights, total)
        self._evidence["bytes_per_weight"] = kept / max(count, 1)


class Examined(Weighted):
    """Holds each weight by what a pass over rows finds when a task ends."""

    examples: int = Field(256, ge=1, description="rows per task that are looked at, at most")

    def begin_task(self, ctx: Context) -> None:
        """Refuse what `end_task` could not do, before the task is trained."""
        super().begin_task(ctx)
        if self.strength != 0:
            require_answers(ctx, every=self._needs_every_answer())

    def _needs_every_answer(self) -> bool:
        """Whether all possible answers are looked at, not only the true one."""
        return False

    def _rows(self, ctx: Context, word: str) -> list[int]:
        """Numbers of the rows to look at, drawn without repeats."""
        rows: list[int] = ctx.random(word).permutation(len(ctx.dataset))[: self.examples].tolist()
        return rows
