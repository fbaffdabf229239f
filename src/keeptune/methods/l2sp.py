"""L2-SP: pull all weights alike towards those before the task, or towards the base model.

Paper: Li, Grandvalet, Davoine 2018, Explicit inductive bias for transfer learning with
    convolutional networks, https://arxiv.org/abs/1802.01483
Equation: L(w) + strength/2 Σ_i (w_i − a_i)², over the weights that are shared; decoupled:
    w ← w − learning rate · strength · (w − a) after each step, as AdamW decays weights
Changes: begin_task, gradients or after_step
Cost: 1 float per trained weight; no extra forward or backward pass.
Use when: the base model's own knowledge is to be kept, and there is no data that shows it.
Not when: the task needs a few weights to move far: all are held alike (ewc, si and mas are not so).
Differs from the paper: weights of the new part, which the paper decays to 0 (its β), are left to
    the trainer's weight_decay: name them in `skip`. Under LoRA the factors are held.
Status: contract tested
"""

from __future__ import annotations

from fnmatch import fnmatch
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from keeptune.errors import MethodError
from keeptune.method import Context
from keeptune.methods._anchor import Anchored, Weights


def bare(name: str) -> str:
    """A weight's name in the model itself, without what PEFT wraps around it."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


class L2SP(Anchored):
    """A quadratic pull of all weights alike towards where they were."""

    to: Literal["task", "base"] = Field(
        "task", description="pull to the weights before each task, or before the first"
    )
    decoupled: bool = Field(
        False, description="pull after the optimizer's step, apart from its scaling of gradients"
    )
    skip: tuple[str, ...] = Field(
        (), description='weights that are free, by name patterns such as "score.*"'
    )

    active_from: ClassVar[int] = 0

    @model_validator(mode="after")
    def _one_form(self) -> L2SP:
        if self.decoupled and self.proximal:
            raise MethodError(
                "L2SP.decoupled and L2SP.proximal are two forms of one step, got both. Choose one: "
                "proximal is stable at any strength, decoupled is AdamW's form."
            )
        return self

    @torch.no_grad()
    def begin_task(self, ctx: Context) -> None:
        """Anchor the weights."""
        super().begin_task(ctx)
        if self.strength == 0:
            return
        weights = self._weights(ctx)
        free = {p: [n for n in weights.names() if fnmatch(bare(n), p)] for p in self.skip}
        for pattern, names in free.items():
            if not names:
                raise MethodError(
                    f"L2SP.skip: no trained weight is called {pattern!r}. They are called such as "
                    f"{', '.join(bare(name) for name in weights.names()[:3])}."
                )
        skipped = {name for names in free.values() for name in names}
        for name in weights.names():
            if name not in skipped and (self.to == "task" or name not in self._anchor):
                self._keep_anchor(weights, name)

    def _acts_after_the_step(self) -> bool:
        return self.proximal or self.decoupled

    def _move_back(self, weights: Weights, name: str, learning_rate: float) -> None:
        if not self.decoupled:
            super()._move_back(weights, name, learning_rate)
            return
        value = weights.value(name)
        for span in weights.spans(name):
            anchor, _ = self._block(name, span, value.device)
            # Not beyond the anchor, however hard it is to hold.
            value[span].lerp_(anchor.to(value.dtype), min(learning_rate * self._strength, 1.0))
