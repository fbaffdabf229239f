"""PackNet: each task gets weights of its own, which no later task changes.

Paper: Mallya & Lazebnik 2018, PackNet: adding multiple tasks to a single network by iterative
    pruning, https://arxiv.org/abs/1711.05769
Equation: for task t: train the weights that no task owns; of these set in each matrix the share
    `prune` with the least |w| to 0; train the rest on; then t owns them. w_ij is trained only by
    its owner, and serve(k) sets w_ij to 0 where owner_ij > k
Changes: begin_task, gradients, after_step, end_task, serve
Cost: one byte for each weight; while a task after the first is learned, two and a copy of the
    weights. Every gradient is masked, at about 0.02 of a step; weights are put back after those
    steps that moved them: after pruning, with weight decay, or beside methods that edit weights.
Use when: the task is known when the model answers, its answers must never change by one bit, and
    the number of tasks is small: each takes 1 − prune of what is left.
Not when: all weights of a pretrained model are trained and its general knowledge matters: the
    first task prunes that too. Train an adapter instead, whose factors are then packed.
Differs from the paper: pruning comes after a share of the task's steps, in the same schedule, not
    after it with half as many epochs more; biases, norms and embeddings (and a head tied to them)
    are frozen after the first task, as there; for an unknown task all weights are served.
Status: contract tested
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import nn

from keeptune.errors import MethodError
from keeptune.method import Context, Method, State
from keeptune.methods._anchor.shards import refuse_shards
from keeptune.methods._isolate import SETTLED, freeze, give_free
from keeptune.methods._isolate.owned import Owned

MOST_TASKS = 255  # owners in a byte; 0 is nobody


def matrices(ctx: Context) -> dict[str, nn.Parameter]:
    """The trained weights that are pruned: all but biases, norms and embeddings."""
    modules = [m for m in ctx.model.modules() if isinstance(m, nn.Embedding)]
    tables = {id(p) for module in modules for p in module.parameters()}
    return {n: p for n, p in ctx.trainable().items() if p.dim() > 1 and id(p) not in tables}


class PackNet(Method):
    """Train free weights, prune them, train the survivors on, and give them to the task."""

    prune: float = Field(0.5, gt=0, lt=1, description="share of a task's weights set free again")
    after: float = Field(
        2 / 3, gt=0, le=1, description="share of the task's steps after which it prunes"
    )

    proof: ClassVar[str] = "own"
    active_from: ClassVar[int] = 0
    traits: ClassVar[frozenset[str]] = frozenset({"isolation"})
    excludes: ClassVar[frozenset[str]] = frozenset({"anchor", "restart", "structure"})
    served: ClassVar[Literal["one model", "per task", "keeptune"]] = "per task"

    _owned: Owned = PrivateAttr(default_factory=Owned)
    _owners: dict[str, int] = PrivateAttr(default_factory=dict)
    _still: list[str] = PrivateAttr(default_factory=list)
    _pruned: bool = PrivateAttr(False)
    _served: int = PrivateAttr(0)

    def _weights(self, ctx: Context) -> dict[str, nn.Parameter]:
        return dict(ctx.model.named_parameters())

    @torch.no_grad()
    def begin_task(self, ctx: Context) -> None:
        """Take all free weights; after the first task freeze all that are not matrices.

        Raises:
            MethodError: No weight is left, or the weights are sharded.
        """
        refuse_shards(ctx, self.name(), SETTLED)
        self._owned.show(self._weights(ctx), self._served)
        packed, self._pruned = matrices(ctx), False
        if self._owned.owner:
            self._refuse_full(ctx, set(packed))
            self._still = freeze(ctx, ctx.trainable().keys() - packed.keys(), self.name())
        self._owned.begin(packed)

    def _refuse_full(self, ctx: Context, packed: set[str]) -> None:
        if packed != self._owned.owner.keys():
            raise MethodError(
                f"packnet shared out {len(self._owned.owner)} matrices in the first task, but "
                f"others are trained in task {ctx.task!r}. Train the same weights in every task."
            )
        if not self._owned.free() or len(self._owners) >= MOST_TASKS:
            raise MethodError(
                f"packnet has no free weight left for task {ctx.task!r}: {len(self._owners)} tasks "
                f"own all {self._owned.total():,}. Begin a new run with a larger prune (now "
                f"{self.prune:g}) or with a larger adapter."
            )

    def _must_hold(self) -> bool:
        """Whether there is anything yet that must not move."""
        return bool(self._owners) or self._pruned

    @torch.no_grad()
    def gradients(self, ctx: Context) -> None:
        """Set the gradients of weights that must stay to 0."""
        if self._must_hold():
            self._owned.hold_gradients(self._weights(ctx))

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        """Prune when it is time; put back weights that decay, momentum or a method moved."""
        if not self._pruned and ctx.steps and ctx.step + 1 >= math.ceil(self.after * ctx.steps):
            self._prune(ctx)
        elif self._must_hold() and self._owned.strayed(weights := self._weights(ctx)):
            self._owned.put_back(weights)
            self._evidence["steps_put_back"] = self._evidence.get("steps_put_back", 0) + 1

    def _prune(self, ctx: Context) -> None:
        """Of each matrix the task keeps the largest of its own weights."""
        own, pruned = self._owned.prune(self._weights(ctx), self.prune, len(self._owners) + 1)
        self._evidence.update(own=own, pruned=pruned)
        self._pruned = True

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        """Give the task what it trained, and show how much is left."""
        if not self._pruned:
            self._prune(ctx)
        self._owned.end(self._weights(ctx))
        give_free(ctx, self._still)
        self._still = []
        self._owners[ctx.task] = self._served = len(self._owners) + 1
        free, total = self._owned.free(), self._owned.total()
        self._evidence.update(frozen=total - free, free=free, free_share=free / total)

    @torch.no_grad()
    def serve(self, ctx: Context, task: str | None) -> None:
        """Set what later tasks own to 0; for an unknown task nothing."""
        weights, every = self._weights(ctx), len(self._owners)
        self._owned.show(weights, self._served)
        self._served = self._owners.get(task or "", every)
        if self._served < every:
            self._owned.hide(weights, self._served)

    def state(self) -> State:
        """Owners; in a task what moves and what is kept; while serving what is hidden."""
        values = {"owners": self._owners, "pruned": self._pruned, "served": self._served}
        return State(self._owned.tensors(), values)

    def restore(self, ctx: Context, state: State) -> None:
        """Take all of it back."""
        self._owned = Owned.of(state.tensors, ctx.device)
        self._owners = dict(state.values["owners"])
        self._pruned, self._served = state.values["pruned"], state.values["served"]

    def declared_bytes(self, ctx: Context) -> int:
        """A byte for each weight; in a task a mask and, after the first, a copy of the weights."""
        return sum(tensor.nbytes for tensor in self._owned.tensors().values())
