"""Slow weights that follow the trained ones as a moving average: what `ema` and `ilora` share."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from keeptune.method import Context, Method, State, wide
from keeptune.methods._anchor.shards import Spec, local, part, spec_of, sum_over_shards, whole


@torch.no_grad()
def follow(slow: list[Tensor], fast: list[Tensor], decay: float) -> None:
    """One step of the average, in place: s ← decay · s + (1 − decay) · w.

    Args:
        slow: In float32 at least.
        fast: Of the same shapes, of any precision.
        decay: What is kept, 0 to 1.
    """
    torch._foreach_lerp_(slow, [w.to(s.dtype) for s, w in zip(slow, fast, strict=True)], 1 - decay)


class Slow(Method):
    """Keeps an average of the trained weights, which answers in their place."""

    decay: float = Field(0.99, ge=0, lt=1, description="share of the slow weights kept each step")
    start: Literal["fast", "slow"] = Field("fast", description="weights a later task starts from")

    neutral: ClassVar[dict[str, Any]] = {"decay": 0.0}
    proof: ClassVar[str] = "moved"
    active_from: ClassVar[int] = 0
    excludes: ClassVar[frozenset[str]] = frozenset({"isolation", "moves", "restart", "structure"})

    _slow: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _fast: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _specs: dict[str, Spec | None] = PrivateAttr(default_factory=dict)
    _begun: int = PrivateAttr(-1)

    def _followed(self, ctx: Context) -> dict[str, nn.Parameter]:
        return {n: p for n, p in ctx.model.named_parameters() if n in self._slow}

    @torch.no_grad()
    def begin_task(self, ctx: Context) -> None:
        """Put the fast weights back, or go on from the slow ones."""
        for name, weight in self._followed(ctx).items():
            if self.start == "slow":
                local(weight).copy_(self._slow[name])
            elif self._fast:
                local(weight).copy_(self._fast[name])
        self._fast.clear()

    @torch.no_grad()
    def gradients(self, ctx: Context) -> None:
        """Before the first step of a task, begin to follow weights that were not trained so far."""
        # Not in `begin_task`: other methods may choose there what is trained.
        if self.decay and self._begun != ctx.index:
            for name, weight in ctx.trainable().items():
                if name not in self._slow:
                    self._slow[name] = wide(local(weight)).clone()
                    self._specs[name] = spec_of(weight)
            self._begun = ctx.index

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        """Let the slow weights follow."""
        if not self._slow:
            return
        weights = self._followed(ctx)
        slow = [self._slow[name] for name in weights]
        fast = [local(weight) for weight in weights.values()]
        if ctx.step & (ctx.step - 1):
            follow(slow, fast, self.decay)
            return
        # At steps that are powers of two, one by one, to see that they really move.
        squares = 0.0
        for s, w, weight in zip(slow, fast, weights.values(), strict=True):
            before = s.clone()
            follow([s], [w], self.decay)
            squares += float(sum_over_shards((s - before).square().sum(), weight))
        self._evidence["moved"] = squares**0.5

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        """Measure how far apart fast and slow weights are."""
        apart = size = 0.0
        for name, weight in self._followed(ctx).items():
            off = self._slow[name] - local(weight)
            apart += float(sum_over_shards(off.square().sum(), weight))
            size += float(sum_over_shards(wide(local(weight)).square().sum(), weight))
        if self._slow:
            self._evidence["distance"] = (apart / size) ** 0.5 if size else 0.0

    @torch.no_grad()
    def serve(self, ctx: Context, task: str | None) -> None:
        """The slow weights, whatever the task."""
        if self._fast:
            return
        for name, weight in self._followed(ctx).items():
            self._fast[name] = local(weight).clone()
            local(weight).copy_(self._slow[name])

    def state(self) -> State:
        """The slow weights, whole."""
        slow = {f"slow/{n}": whole(t, self._specs[n]) for n, t in self._slow.items()}
        return State(slow, {"begun": self._begun})

    def restore(self, ctx: Context, state: State) -> None:
        """Take the slow weights back; the model's own are the fast ones."""
        kept = {n[5:]: t for n, t in state.tensors.items() if n.startswith("slow/")}
        weights = {n: p for n, p in ctx.model.named_parameters() if n in kept}
        self._slow = {n: part(kept[n], weight) for n, weight in weights.items()}
        self._specs = {n: spec_of(weight) for n, weight in weights.items()}
        self._fast.clear()
        self._begun = int(state.values["begun"])

    def declared_bytes(self, ctx: Context) -> int:
        """Four bytes for each weight that was ever trained, and the fast ones while it serves."""
        shards = [local(p.detach()) for p in self._followed(ctx).values()]
        slow = sum(t.numel() * max(4, t.element_size()) for t in shards)
        return slow + sum(t.nbytes for t in shards) * bool(self._fast)
