"""The strongest directions of each matrix stay exactly as they are; tasks learn in the others.

Paper: Nayak et al. 2025, Sculpting subspaces: constrained full fine-tuning in LLMs for continual
    learning, https://arxiv.org/abs/2504.07097
Equation: when a task begins W = U Σ Vᵀ, of which the k largest triples are old; then always
    Uᵀ W = Σ Vᵀ and W V = U Σ on these, by G ← (I − U Uᵀ) G (I − V Vᵀ) on gradients and by putting
    the old part back after each step; k = (ratio + grow · (t − 1)) · min(out, in) in task t
Changes: begin_task, gradients, after_step, end_task
Cost: while a task is trained k · (in + out) floats for each matrix; an SVD of each when it begins;
    in each step about 2.7 k / tokens of the step's own arithmetic: small steps get slow.
Use when: all weights are trained, no old data may be kept, and base knowledge must not be
    overwritten.
Not when: batches are small and time is short; the head, embeddings, norms and biases must be held
    too: they are trained freely.
Differs from the paper: the share of old directions is the same in all matrices and grows by a fixed
    step, where the paper gives each layer its own by how much it changes its input. As in the
    authors' code each factor stays in its complement, which is stricter than the formula for G in
    the paper; the weights are held as well, since AdamW leaves the subspace though each gradient is
    in it (PEFT's adapter `osf` projects gradients only). Under LoRA the changes of B and A are held
    so, which keeps Uᵀ W V, but no single factor of W; DoRA is refused.
Status: contract tested
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr

from keeptune.errors import MethodError
from keeptune.method import Context, Method, State, wide
from keeptune.methods._adapters import refuse_dora
from keeptune.methods._anchor.shards import refuse_shards
from keeptune.methods._subspace import Old, old_directions


class OSF(Method):
    """Learn each task off the strongest directions that the weights had before it."""

    ratio: float = Field(0.5, ge=0, lt=1, description="share of directions held in the first task")
    grow: float = Field(0.1, ge=0, lt=1, description="share held more with each further task")

    neutral: ClassVar[dict[str, Any]] = {"ratio": 0.0}
    proof: ClassVar[str] = "gradient_share"
    active_from: ClassVar[int] = 0
    excludes: ClassVar[frozenset[str]] = frozenset({"structure", "restart"})

    _old: dict[str, Old] = PrivateAttr(default_factory=dict)

    @torch.no_grad()
    def begin_task(self, ctx: Context) -> None:
        """Find the old directions of the present weights.

        Raises:
            MethodError: FSDP has sharded the weights, the adapter is a DoRA, or no linear layer is
                trained.
        """
        if not self.ratio:
            return
        refuse_dora(ctx, self.name(), "holds LoRA's update")
        why = "needs whole matrices, but FSDP spreads them over processes"
        refuse_shards(ctx, self.name(), why)
        # One direction at least is left to learn in.
        share = min(self.ratio + self.grow * ctx.index, 0.99)
        self._old = dict(old_directions(ctx, share))
        if not self._old:
            raise MethodError(
                "The method 'osf' holds directions of linear layers, but none is trained here. "
                "Train all weights or a LoRA adapter on linear layers, or remove the method."
            )
        self._evidence["directions_held"] = sum(old.kept.shape[0] for old in self._old.values())

    @torch.no_grad()
    def gradients(self, ctx: Context) -> None:
        """Take the old directions out of the gradients."""
        if not self._old:
            return
        is_shown = not ctx.step & (ctx.step - 1)  # at steps that are powers of two
        removed = total = 0.0
        for name, weight in ctx.trainable().items():
            if name in self._old and weight.grad is not None:
                before = weight.grad.clone() if is_shown else None
                self._old[name].free(weight.grad)
                if before is not None:
                    total += float(wide(before).square().sum())
                    removed += float(wide(before - weight.grad).square().sum())
        if is_shown and total:
            share = (removed / total) ** 0.5
            self._evidence["gradient_share"] = max(share, self._evidence.get("gradient_share", 0.0))

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        """Put the old part of the weights back."""
        if self._old:
            for name, weight in ctx.trainable().items():
                if name in self._old:
                    self._old[name].put_back(weight)

    def end_task(self, ctx: Context) -> None:
        """Drop the directions: the next task finds its own."""
        self._old.clear()

    def state(self) -> State:
        """The old directions, while a task is trained."""
        parts = {f"{name}/{k}": t for name, old in self._old.items() for k, t in vars(old).items()}
        return State({name: tensor for name, tensor in parts.items() if tensor is not None})

    def restore(self, ctx: Context, state: State) -> None:
        """Take the old directions back."""
        kept = {name: tensor.to(ctx.device) for name, tensor in state.tensors.items()}
        names = [name.removesuffix("/kept") for name in kept if name.endswith("/kept")]
        self._old = {
            n: Old(kept.get(f"{n}/u"), kept.get(f"{n}/v"), kept[f"{n}/kept"]) for n in names
        }

    def declared_bytes(self, ctx: Context) -> int:
        """Bases and kept values, while a task is trained."""
        return sum(
            t.nbytes for old in self._old.values() for t in vars(old).values() if t is not None
        )
