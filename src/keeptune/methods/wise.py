"""WiSE-FT: after each task, go back part of the way to the weights before it.

Paper: Wortsman et al. 2022, Robust fine-tuning of zero-shot models,
    https://arxiv.org/abs/2109.01903 ; by blocks of layers: Lin et al. 2024 (HMA),
    Mitigating the alignment tax of RLHF, https://arxiv.org/abs/2309.06256
Equation: w ← (1 − mix) w_before + mix w_after; three numbers are the mix of the lower, middle and
    upper third of the layers
Changes: begin_task, end_task
Cost: one copy of the trained weights (adapters only, under LoRA); no time per step.
Use when: you want the simplest protection of general knowledge, with or without any old data.
Not when: tasks are facts to be memorised: the weights half-way often hold neither well.
Differs from the paper: applied after every task of a stream, with the weights before that task as
    the other end. Under LoRA the effective update ΔW = scale · B A is interpolated, then cut to the
    adapter's rank by SVD; the error of the cut is in the evidence. HMA looks for its blocks' mix,
    whose mean it fixes, by training; here the three are given.
Status: contract tested
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, GetCoreSchemaHandler, PrivateAttr
from pydantic_core import CoreSchema, core_schema
from torch import Tensor

from keeptune.method import Context, Method, State
from keeptune.methods._factors import mix_factors


@dataclass(frozen=True)
class OneOrThree:
    """Validates a number between `ge` and `le`, or three of them."""

    ge: float = 0.0
    le: float = 1.0

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """The two, told apart by the value."""
        one = core_schema.float_schema(ge=self.ge, le=self.le, allow_inf_nan=False)
        three = core_schema.tuple_schema([one, one, one])
        return core_schema.tagged_union_schema(
            {"one": one, "three": three},
            lambda value: "three" if isinstance(value, list | tuple) else "one",
        )


def thirds(names: Sequence[str]) -> list[int]:
    """Whether each weight is in the lower (0), middle (1) or upper (2) third of the layers.

    Args:
        names: In the model's order; a layer's number is the first one in a name. What comes before
            all layers belongs to the lower third, what comes after them to the upper one.
    """
    found = [re.search(r"\.(\d+)\.", name) for name in names]
    layers = 1 + max((int(match[1]) for match in found if match), default=0)
    blocks, met = [], False
    for match in found:
        met = met or match is not None
        blocks.append(3 * int(match[1]) // layers if match else 2 * met)
    return blocks


class WiSE(Method):
    """Interpolate the weights before and after each task."""

    mix: Annotated[float | tuple[float, float, float], OneOrThree()] = Field(
        0.5, description="share of the new weights; or three, from the lower layers to the upper"
    )

    neutral: ClassVar[dict[str, Any]] = {"mix": 1.0}
    proof: ClassVar[str] = "moved_back"
    active_from: ClassVar[int] = 0
    traits: ClassVar[frozenset[str]] = frozenset({"moves"})
    excludes: ClassVar[frozenset[str]] = frozenset({"structure", "restart"})

    _before: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    def _active(self) -> bool:
        return self.mix not in (1, (1, 1, 1))

    def begin_task(self, ctx: Context) -> None:
        """Keep the weights before the task."""
        if self._active():
            self._before = {n: p.detach().clone() for n, p in ctx.trainable().items()}

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        """Set the weights between those before and those after."""
        if not self._active():
            return
        weights = ctx.trainable()
        mixes = self.mix if isinstance(self.mix, tuple) else (self.mix,) * 3
        squares, worst = 0.0, 0.0
        for name, block in zip(weights, thirds(list(weights)), strict=True):
            mix = mixes[block]
            if mix == 1:
                continue
            partner = name.replace(".lora_A.", ".lora_B.")
            if partner != name and partner in weights:
                pair = [(weights[n], self._before[n]) for n in (name, partner)]
                (a, a_old), (b, b_old) = pair
                new_a, new_b, error = mix_factors((a_old, b_old), (a, b), mix)
                squares += float((new_a - a).square().sum() + (new_b - b).square().sum())
                a.copy_(new_a)
                b.copy_(new_b)
                worst = max(worst, error)
            elif ".lora_B." not in name:
                step = (1 - mix) * (self._before[name] - weights[name])
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
