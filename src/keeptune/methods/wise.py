"""WiSE-FT: after each task, go back part of the way to the weights before it.

Paper: Wortsman et al. 2022, Robust fine-tuning of zero-shot models,
    https://arxiv.org/abs/2109.01903 ; by blocks of layers: Lin et al. 2024 (HMA),
    Mitigating the alignment tax of RLHF, https://arxiv.org/abs/2309.06256
Equation: w ← (1 − mix) w_before + mix w_after; three numbers are the mix of the lower, middle and
    upper third of the layers. With `guard`: the same with s · mix, where s is the largest share
    from 0 to 1, found by halving, at which L_guard(w) ≤ L_guard(w_before) + rise
Changes: begin_task, end_task
Cost: one copy of the trained weights (adapters only, under LoRA); no time per step. With `guard`
    another copy while a task ends, and up to eight passes over its texts.
Use when: you want the simplest protection of general knowledge, with or without any old data.
Not when: tasks are facts to be memorised: the weights half-way often hold neither well.
Differs from the paper: applied after every task of a stream, with the weights before that task as
    the other end. Under LoRA the effective update ΔW = scale · B A is interpolated, then cut to the
    adapter's rank by SVD; the error of the cut is in the evidence; DoRA is refused. HMA looks for
    its blocks' mix, whose mean it fixes, by training; here the three are given. The paper chooses
    the mix by accuracy on held-out images, or takes 0.5; `guard` goes by the loss of texts, mean
    over the texts of nats a token, with the cut to the adapter's rank in it. As halving looks at
    few places, a larger share might hold too where the loss falls and rises again in between.
Status: contract tested
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from keeptune.errors import MethodError
from keeptune.layers import blocks_of
from keeptune.method import Context, Method, State
from keeptune.methods._adapters import refuse_dora
from keeptune.methods._factors import in_pairs, mix_factors
from keeptune.methods._guarded import guard_texts, share_within, text_loss
from keeptune.methods._thirds import OneOrThree
from keeptune.processes import spread_like


class WiSE(Method):
    """Interpolate the weights before and after each task."""

    mix: Annotated[float | tuple[float, float, float], OneOrThree()] = Field(
        0.5, description="share of the new weights; or three, from the lower layers to the upper"
    )
    guard: str = Field(
        "", description="file of texts, one a line, that decides how much of `mix` is taken"
    )
    rise: float = Field(
        0.05, ge=0, description="with a guard: what its loss may rise by in a task, in nats a token"
    )

    neutral: ClassVar[dict[str, Any]] = {"mix": 1.0}
    proof: ClassVar[str] = "moved_back"
    active_from: ClassVar[int] = 0
    traits: ClassVar[frozenset[str]] = frozenset({"moves"})
    excludes: ClassVar[frozenset[str]] = frozenset({"structure", "restart"})

    _before: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _texts: list[dict[str, Any]] = PrivateAttr(default_factory=list)

    def _active(self) -> bool:
        return self.mix not in (1, (1, 1, 1))

    def begin_task(self, ctx: Context) -> None:
        """Keep the weights before the task, and read the guard's texts.

        Raises:
            MethodError: There is a guard, and no text of it, nothing to choose, or a classifier;
                or the adapter is a DoRA.
        """
        if self.guard and not self._active():
            raise MethodError(
                f"WiSE.guard decides how much of mix is taken, but mix is {self.mix}, which is "
                "plain fine-tuning. Set mix to the most that the new weights may have, as 0.9, or "
                "leave guard out."
            )
        if self.guard:
            self._texts = guard_texts(ctx, self.guard, "WiSE.guard")
        if self._active():
            refuse_dora(ctx, self.name(), "interpolates LoRA's update")
            self._before = {n: p.detach().clone() for n, p in ctx.trainable().items()}

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        """Set the weights between those before and those after."""
        if not self._active():
            return
        share = self._choose(ctx) if self.guard else 1.0
        squares, worst = self._go_back(ctx, share)
        self._evidence.update(moved_back=squares**0.5, worst_cut_error=worst)
        self._before.clear()

    def _go_back(self, ctx: Context, share: float) -> tuple[float, float]:
        """Interpolate by a share of the mix; gives the squared distance, and the worst cut."""
        weights = ctx.trainable()
        mixes = self.mix if isinstance(self.mix, tuple) else (self.mix,) * 3
        blocks = dict(zip(weights, blocks_of(list(weights), 3), strict=True))
        squares, worst = 0.0, 0.0
        for name, partner in in_pairs(weights):
            mix = share * mixes[blocks[name]]
            if mix == 1:
                continue
            own = [name] if partner is None else [name, partner]
            old, now = [self._before[n] for n in own], [weights[n] for n in own]
            if mix == 0:
                new = old
            elif partner is None:
                new = [now[0] + (1 - mix) * (old[0] - now[0])]
            else:
                *new, error = mix_factors((old[0], old[1]), (now[0], now[1]), mix)
                worst = max(worst, error)
            for weight, value in zip(now, new, strict=True):
                squares += float((value - weight).square().sum())
                weight.copy_(value)
        return squares, worst

    def _choose(self, ctx: Context) -> float:
        """The largest share of the mix that the guard bears; the weights stay as they are."""
        weights = ctx.trainable()
        after = {name: weight.detach().clone() for name, weight in weights.items()}

        def put(kept: dict[str, Tensor]) -> None:
            for name, weight in weights.items():
                weight.copy_(kept[name])

        def loss(share: float) -> float:
            put(after)
            self._go_back(ctx, share)
            return text_loss(ctx, self._texts)

        put(self._before)
        before = text_loss(ctx, self._texts)
        found = share_within(loss, before, before + self.rise)
        put(after)
        self._evidence.update({f"guard_{k}": v for k, v in found.items()}, guard_before=before)
        return found["share"]

    def state(self) -> State:
        """The weights before the present task."""
        return State({f"before/{n}": t for n, t in self._before.items()})

    def restore(self, ctx: Context, state: State) -> None:
        """Take the weights before the present task back."""
        kept = {n.removeprefix("before/"): t.to(ctx.device) for n, t in state.tensors.items()}
        weights = ctx.trainable()
        self._before = {n: spread_like(t, weights[n]) for n, t in kept.items()}

    def declared_bytes(self, ctx: Context) -> int:
        """One copy of the trained weights during a task, nothing between tasks."""
        weights = sum(p.numel() * p.element_size() for p in ctx.trainable().values())
        return weights if self._before else 0
