"""The path integral of synaptic intelligence: what each weight did for the loss on its way.

ω_i = −Σ_steps g_i · Δw_i, with g the task's own gradient and Δw the optimizer's real step
(Zenke, Poole, Ganguli 2017, eq. 3).
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, distributed
from torch.utils.hooks import RemovableHandle

from keeptune.method import Context, State, wide
from keeptune.methods._anchor.importance import Weighted
from keeptune.methods._anchor.kept import Kept
from keeptune.methods._anchor.penalty import is_measured
from keeptune.methods._anchor.shards import Spec, part, whole
from keeptune.methods._anchor.weights import Effective, Weights, blocks
from keeptune.processes import processes


class PathIntegral:
    """Adds up ω over the steps of a task.

    A step is seen twice: `before` it adds g·(w − a), `after` it takes g·(w − a) with the new w off.
    With a the weights at the start of the task the numbers are small, so nothing cancels; and no
    copy of the weights is needed, only one of the gradient until the step is done.

    Attributes:
        omega: ω so far by name, in the weight's shape; float32, or float64 for such weights.
    """

    def __init__(self) -> None:
        self.omega: dict[str, Tensor] = {}
        self._gradient: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._is_seen = False  # the present step's gradient; what comes later is not the task's

    def start(self, weights: Weights) -> None:
        """Watch the gradients of effective weights, which no parameter has."""
        self.stop()
        # Left by a task that failed, if by any.
        self.omega.clear()
        self._gradient.clear()
        self._is_seen = False
        if isinstance(weights, Effective):
            for name, module in weights.modules.items():
                self._hooks.append(module.register_forward_hook(self._watch(name)))

    def stop(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _watch(self, name: str) -> Any:
        def forward(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            if module.training and output.requires_grad:
                inputs = args[0].detach()
                add = partial(self._add, name, inputs)
                output.register_hook(add)  # type: ignore[no-untyped-call]

        return forward

    @torch.no_grad()
    def _add(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        if self._is_seen:
            return  # a pass of another method's own
        # ∂L/∂W = Σ over positions of δ xᵀ, added up over micro batches.
        left, right = wide(gradient.flatten(0, -2)), wide(inputs.flatten(0, -2))
        right = right.to(left.dtype)
        if name in self._gradient:
            self._gradient[name].addmm_(left.T, right)
        else:
            self._gradient[name] = left.T @ right

    @torch.no_grad()
    def before(
        self,
        ctx: Context,
        weights: Weights,
        anchors: dict[str, Kept],
        importances: dict[str, Kept],
        strength: float,
    ) -> None:
        """Look at the gradient of the task alone; then add strength · Ω (w − a) to it.

        In one pass over the weights: what is read for the path is not read again for the pull.
        """
        for name in weights.names():
            if (gradient := self._task_gradient(weights, name)) is not None:
                self._gradient[name] = (
                    gradient if ctx.grad_scale == 1 else gradient / ctx.grad_scale
                )
        self._is_seen = True
        if ctx.may_overflow and not self._is_finite():
            # The step will be left out, and `after` is not called.
            self._gradient.clear()
            self._is_seen = False
        for name in weights.names():
            importance = importances.get(name) if strength else None
            self._pass(weights, name, anchors[name], 1.0, importance, strength * ctx.grad_scale)

    @torch.no_grad()
    def after(self, weights: Weights, anchors: dict[str, Kept]) -> None:
        """Look at where the optimizer's step has led."""
        for name in self._gradient:
            self._pass(weights, name, anchors[name], -1.0)
        self._gradient.clear()
        self._is_seen = False

    def _is_finite(self) -> bool:
        sums = [gradient.sum() for gradient in self._gradient.values()]
        return not sums or bool(torch.isfinite(torch.stack(sums)).all())

    def _task_gradient(self, weights: Weights, name: str) -> Tensor | None:
        """The flat gradient, a copy; None where the loss does not depend on the weight."""
        if not (isinstance(weights, Effective) and name in weights.modules):
            gradient = weights.owner(name).grad
            return None if gradient is None else wide(weights.room(name).clone())
        gradient = self._gradient.get(name)
        _, world = processes()
        if gradient is not None and world > 1:
            # What DDP does to the gradients of parameters.
            distributed.all_reduce(gradient)
            gradient /= world
        return None if gradient is None else gradient.view(-1)

    def _pass(
        self,
        weights: Weights,
        name: str,
        anchor: Kept,
        sign: float,
        importance: Kept | None = None,
        strength: float = 0.0,
    ) -> None:
        """Add sign · g (w − a) to ω, and a pull to the gradient, block by block."""
        gradient = self._gradient.get(name)
        if gradient is None and importance is None:
            return
        value = weights.value(name)
        if gradient is not None and name not in self.omega:
            self.omega[name] = weights.shaped(name, torch.zeros_like(gradient))
        omega = None if gradient is None else self.omega[name].view(-1)
        room = None if importance is None else weights.room(name)
        for span in blocks(value):
            apart = wide(value[span]) - anchor.block(span.start, span.stop, value.device)
            if gradient is not None and omega is not None:
                omega[span].addcmul_(gradient[span], apart, value=sign)
            if importance is not None and room is not None:
                weight = importance.block(span.start, span.stop, value.device)
                room[span].addcmul_(weight, apart, value=strength)
        if room is not None:
            weights.spread(name, room)

    def take(self, name: str, displacement: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """ω / (d² + ξ) of the task that ends (Zenke et al., eq. 5), and ω starts anew.

        Args:
            name: Which weight.
            displacement: d, where it ended less where it began.
            damping: ξ, above 0.

        Returns:
            The importance in the same shape, with what is below 0 set to 0; and the sums of ω
            above 0 and of −ω below 0, [2].
        """
        if name not in self.omega:
            return torch.zeros_like(displacement), torch.zeros(2, dtype=torch.float64)
        omega = self.omega.pop(name)
        mass = torch.stack([omega.relu().sum(), (-omega).relu().sum()]).double().cpu()
        return omega.div_(displacement.square() + damping).clamp_(min=0), mass

    def tensors(self, specs: dict[str, Spec | None]) -> dict[str, Tensor]:
        """ω so far, whole, for a state; `specs` say how each weight is spread over processes."""
        return {f"path/{n}": whole(t, specs.get(n)) for n, t in self.omega.items()}

    def restore(self, weights: Weights, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        self.omega = {
            name: part(tensors[f"path/{name}"], weights.owner(name))
            for name in weights.names()
            if f"path/{name}" in tensors
        }

    def declared_bytes(self, weights: Weights) -> int:
        """A float32 (float64 for such weights) for each weight that has had a gradient."""
        values = [weights.value(name) for name in weights.names() if name in self.omega]
        return sum(max(4, v.element_size()) * v.numel() for v in values)


class Travelled(Weighted):
    """Holds each weight by what it did for the loss on its way."""

    traits: ClassVar[frozenset[str]] = Weighted.traits | {"path"}

    damping: float = Field(1e-3, gt=0, description="ξ, added to the squared way of each weight")

    _path: PathIntegral = PrivateAttr(default_factory=PathIntegral)

    def reads_the_step(self, ctx: Context) -> bool:
        """While the path of a task is recorded; after it, the pull is one among others."""
        return self._is_recording(ctx)

    def _is_recording(self, ctx: Context) -> bool:
        """Whether the path of this task counts."""
        return self.strength != 0

    def begin_task(self, ctx: Context) -> None:
        """Anchor the weights where the task begins, and watch its path."""
        super().begin_task(ctx)
        if not self._is_recording(ctx):
            return
        weights = self._weights(ctx)
        with torch.no_grad():
            for name in weights.names():
                self._keep_anchor(weights, name)
        self._path.start(weights)

    @torch.no_grad()
    def gradients(self, ctx: Context) -> None:
        """Look at the task's own gradient, then add the pull."""
        if not self._is_recording(ctx):
            super().gradients(ctx)
            return
        weights = self._weights(ctx)
        if self._importance and is_measured(ctx.step):
            self._measure(ctx, weights)
        strength = 0.0 if self._acts_after_the_step() else self._strength
        self._path.before(ctx, weights, self._anchor, self._importance, strength)

    def after_step(self, ctx: Context) -> None:
        """Look at the optimizer's step; with `proximal`, then move back."""
        if self._is_recording(ctx):
            self._path.after(self._weights(ctx), self._anchor)
        super().after_step(ctx)

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        """Turn the path into importance, and anchor the weights where they are."""
        self._path.stop()
        if not self._is_recording(ctx):
            return
        weights = self._weights(ctx)
        mass = torch.zeros(2, dtype=torch.float64)
        importances = {}
        for name in weights.names():
            value = weights.shaped(name, weights.value(name))
            way = wide(value) - self._anchor[name].full(value.device)
            importances[name], sums = self._path.take(name, way, self.damping)
            mass += sums
        self._add_importances(weights, importances)
        for name in weights.names():
            self._keep_anchor(weights, name)
        above, below = self._over_shards(weights, mass)
        self._evidence["negative_share"] = below / (above + below) if above + below else 0.0
        self._show_importance(weights)

    def _add_importances(self, weights: Weights, importances: dict[str, Tensor]) -> None:
        """Add a task's importances to those of the tasks before."""
        for name in weights.names():
            total = self._importance_of(weights, name).add_(importances.pop(name))
            self._keep_importance(name, total)

    def state(self) -> State:
        """Also the path so far."""
        kept = super().state()
        return State(kept.tensors | self._path.tensors(self._specs), kept.values)

    def restore(self, ctx: Context, state: State) -> None:
        """Also the path so far."""
        super().restore(ctx, state)
        self._path.restore(self._weights(ctx), state.tensors)

    def declared_bytes(self, ctx: Context) -> int:
        """Also the path, from a task's first step to its end."""
        return super().declared_bytes(ctx) + self._path.declared_bytes(self._weights(ctx))
